"""The proving ground: one command a table, `python -m bench TABLE [--quick]` (or `python3 dev.py bench TABLE`).

A table is a module here with a `main(quick) -> Table`. See README.md.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def prepare() -> None:
    """ComfyUI's modules and this pack (as `rudder`) importable in this process; on the CPU where there is no GPU.

    Raises:
        SystemExit: COMFYUI_PATH does not lead to a ComfyUI.
    """
    path = os.environ.get("COMFYUI_PATH", "")
    if not (Path(path) / "comfyui_version.py").is_file():
        raise SystemExit("bench needs a ComfyUI tree in COMFYUI_PATH; `python3 dev.py bench` sets it.")
    if path not in sys.path:
        sys.path.insert(0, path)
    import torch
    from comfy.cli_args import args

    args.cpu = args.cpu or not torch.cuda.is_available()
    args.disable_api_nodes = True
    if "rudder" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "rudder", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules["rudder"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["rudder"])


@dataclass
class Table:
    """Rows of numbers with what is needed to trust and repeat them.

    ``columns`` maps the keys of a row to (heading, format); a row may lack a column. ``notes`` are sentences.
    """

    name: str
    title: str
    columns: dict[str, tuple[str, str]]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        cells = [[heading for heading, _ in self.columns.values()]]
        for row in self.rows:
            cells.append([format(row[key], how) if key in row else "" for key, (_, how) in self.columns.items()])
        cells.insert(1, ["---" if how == "" else "---:" for _, how in self.columns.values()])
        lines = ["| " + " | ".join(line) + " |" for line in cells]
        facts = [f"{key}: {value}" for key, value in self.facts.items()]
        return "\n".join([f"# {self.title}", "", *lines, "", *[f"* {note}" for note in (*self.notes, *facts)], ""])

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        record = {"table": self.name, "title": self.title, "facts": self.facts, "notes": self.notes, "rows": self.rows}
        (folder / f"{self.name}.md").write_text(self.markdown(), encoding="utf-8")
        (folder / f"{self.name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def facts(started: float, quick: bool) -> dict[str, Any]:
    """Where and when a table was measured; ``started`` is a ``time.time()``."""
    import comfyui_version
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    command = " ".join(["python3 dev.py bench", *sys.argv[1:]])
    comfyui, python = comfyui_version.__version__, platform.python_version()
    return {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(started)),
        "machine": f"{processor()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, {gpu}{load}",
        "versions": f"ComfyUI {comfyui}, torch {torch.__version__}, Python {python}",
        "command": command + (" (quick: shows that it works, measures nothing)" if quick else ""),
        "wall time": f"{time.time() - started:.0f} s",
    }


def commit() -> str:
    """The commit of this clone, with a plus sign when tracked files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "guidance", "host", "nodes", "bench/*.py"])
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.returncode else "")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
