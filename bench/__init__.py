"""The proving ground: one command a table, `python -m bench TABLE [--quick]` (or `python3 dev.py bench TABLE`).

A table is a module here with a `main(options) -> Table`. See README.md.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Options:
    """What the command line asks of a table; a table ignores what it has no use for.

    Attributes:
        quick: a small run that shows that everything works and measures nothing.
        models: names of demo models or files; empty means each that exists.
        n: pictures a cell; None means the table's own.
        split: which half of the prompt list, 'dev' or 'final'.
        shard: (i, k): do the i-th of k equal parts of the work.
        work: folder for what an interrupted run goes on from; None means the user's cache.
        kept: folder of the marks of finished rows (``kept.py``); None means beside the pictures.
        check: paint the first batch of kept rows again and drop those that are no longer true.
        until: of time.monotonic(), when nothing more is painted, so that a table is made of what is there.
        precision: of the networks, a key of ``generate.PRECISIONS``.
    """

    quick: bool = False
    models: tuple[str, ...] = ()
    n: int | None = None
    split: str = "dev"
    shard: tuple[int, int] = (0, 1)
    work: Path | None = None
    precision: str = "fp32"
    until: float = math.inf
    kept: Path | None = None
    check: bool = False


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

    ``columns`` maps the keys of a row to (heading, format); a row may lack a column, and a value may be anything that
    formats, such as ``stats.Interval``. ``notes`` are sentences. ``plots`` maps a name to what saves its picture under
    a path (``figure.savefig``, ``image.save``), None for the one that an earlier run has left there, if any. ``parts``
    are further tables of the run, printed below as sections.
    """

    name: str
    title: str
    columns: dict[str, tuple[str, str]]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    plots: dict[str, Callable[[Path], Any] | None] = field(default_factory=dict)
    parts: list[Table] = field(default_factory=list)

    def markdown(self, level: int = 1) -> str:
        cells = [[heading for heading, _ in self.columns.values()]]
        for row in self.rows:
            cells.append([format(row[key], how) if key in row else "" for key, (_, how) in self.columns.items()])
        cells.insert(1, ["---" if how == "" else "---:" for _, how in self.columns.values()])
        lines = ["| " + " | ".join(line) + " |" for line in cells]
        if self.plots:
            lines += ["", *(f"![{name}]({self.picture(name)})" for name in self.plots)]
        facts = [f"{key}: {value}" for key, value in self.facts.items()]
        about = [f"* {note}" for note in (*self.notes, *facts)]
        parts = [part.markdown(level + 1) for part in self.parts]
        return "\n".join([f"{'#' * level} {self.title}", "", *lines, "", *about, *([""] if about else []), *parts])

    def picture(self, name: str) -> str:
        """The file name of a plot, beside the table's own files."""
        return f"{self.name}-{name}.png"

    def record(self) -> dict[str, Any]:
        """What the JSON file holds."""
        out = {"table": self.name, "title": self.title, "facts": self.facts, "notes": self.notes, "rows": self.rows}
        if self.plots:
            out["plots"] = [self.picture(name) for name in self.plots]
        return out | ({"parts": [part.record() for part in self.parts]} if self.parts else {})

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for table in (self, *self.parts):
            table.plots = {name: save for name, save in table.plots.items()
                           if save or (folder / table.picture(name)).is_file()}
        (folder / f"{self.name}.md").write_text(self.markdown(), encoding="utf-8")
        text = json.dumps(self.record(), indent=1, default=plain) + "\n"
        (folder / f"{self.name}.json").write_text(text, encoding="utf-8")
        for table in (self, *self.parts):
            for name, save in table.plots.items():
                if save:
                    save(folder / table.picture(name))


def plain(value: Any) -> Any:
    """A dataclass in a row, such as an interval, for JSON; an end that it does not have is null.

    Raises:
        TypeError: anything else.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(value).items()}
    raise TypeError(f"{type(value).__name__} does not go into JSON")


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
        measured = ("attention", "guidance", "host", "inversion", "nodes", "demo", "bench/*.py")
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *measured])
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.returncode else "")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
