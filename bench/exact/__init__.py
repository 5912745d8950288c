"""Guidance methods against a known truth: Gaussian mixtures sampled through the real host.

``mixture`` holds the mathematics, ``worlds`` the three worlds, ``model`` a world as a ComfyUI MODEL, ``distances`` what
is measured, ``table`` and ``pictures`` the table `exact` and its plots. The first, second and fourth need no ComfyUI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .. import Options, Table


def main(options: Options) -> Table:
    """The table `exact`; ``quick`` has fewer samples, steps and weights, ``n`` sets the samples a row."""
    from .table import main

    return main(options)
