"""Reports whether this ComfyUI can run Rudder and what optional packages would add. Installs and changes nothing."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

FLOOR = (0, 18, 2)
OPTIONAL = {
    "insightface": "face detection for identity nodes (this release has none yet)",
}


def comfyui_version() -> str | None:
    """The version of the ComfyUI that is running us, or of the one whose custom_nodes folder we are in."""
    try:
        from comfyui_version import __version__

        return __version__
    except ImportError:
        pass
    above = Path(__file__).absolute().parents[2]
    for tree in (above, Path(os.environ.get("COMFYUI_PATH") or above)):  # where custom_nodes lies elsewhere
        file = tree / "comfyui_version.py"
        if file.is_file() and (found := re.search(r'__version__ = "([^"]+)"', file.read_text(encoding="utf-8"))):
            return found[1]
    return None


def report() -> list[str]:
    version = comfyui_version()
    lines = []
    if version is None:
        lines.append("Which ComfyUI will load this cannot be told from here: it must be "
                     f"{'.'.join(map(str, FLOOR))} or newer, and this folder in its custom_nodes.")
    elif tuple(int(n) for n in re.findall(r"\d+", version)[:3]) < FLOOR:
        lines.append(f"ComfyUI {version} is too old, {'.'.join(map(str, FLOOR))} is the oldest that works: update it.")
    else:
        lines.append(f"ComfyUI {version}: good.")
    for package, use in OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            lines.append(
                f"Optional: {package} is not installed. It adds {use}: {sys.executable} -m pip install {package}"
            )
    return lines


if __name__ == "__main__":
    try:
        print("\n".join(f"[Rudder] {line}" for line in report()))
    except Exception as error:  # a report must never stop an installation
        print(f"[Rudder] could not check this installation: {error}")
