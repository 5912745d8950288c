"""The only code that knows ComfyUI's internals."""

from .patch import add_guidance
from .run import plan_of
from .second import companion
from .sizes import trained_cells

__all__ = ["add_guidance", "companion", "plan_of", "trained_cells"]
