"""The only code that knows ComfyUI's internals."""

from .patch import add_guidance
from .run import plan_of

__all__ = ["add_guidance", "plan_of"]
