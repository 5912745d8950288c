"""Cells of a table: pictures of one model, category, method and anchor, kept so that a long run can be interrupted.

A cell is a list of pictures in a fixed order: prompts round and round, every time round with new seeds. The same seeds
serve every method and model, so differences between cells are differences of the same pictures. The order does not
depend on how many are wanted: more pictures later go on where a shorter run stopped.

Painting costs hours and judging seconds, so pictures are kept (one PNG strip a batch, with what it cost as text inside)
and read again by whatever judge there is. A folder belongs to one state of model file, settings, prompt list and method
code, all of them hashed into its name. What the judge saw outlives the pictures (``kept.py``).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import io
import json
import math
import os
import re
import statistics
import sys
import tempfile
import textwrap
import time
import tokenize
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from rudder.host.demo import MODELS

from . import RESULTS, ROOT, Options, commit, measures, rareshapes
from .generate import Methods, Painter, Settings
from .kept import Kept, agree, restored, rounded, whole
from .rareshapes import RarePrompt

BATCH = 32  # pictures a file and a batch: a process that is ended loses at most these
#: What decides a picture besides model, settings and methods (``code_of``).
CODE = ("guidance/contract.py", "guidance/space.py", "attention/contract.py", "attention/sites.py", "host/patch.py",
        "host/run.py", "host/conds.py", "host/attention.py", "host/sites/__init__.py", "host/sites/unet.py",
        "host/sites/flux.py", "host/words.py", "host/demo.py", "bench/generate.py")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
PURE = ("guidance", "attention", "inversion", "identity")  # folders of methods


@dataclass(frozen=True)
class Cell:
    """What the pictures have in common. ``method`` is the key of a row, ``anchor`` a strategy, '' for none, ``code`` a
    digest of what decides the pictures beside what the store's folder stands for, '' for nothing."""

    category: str
    split: str
    method: str
    anchor: str = ""
    cfg: float = 5.0
    n: int = 512
    code: str = ""

    @property
    def key(self) -> str:
        """Name of the folder. It does not hold ``n``: a larger table goes on with the pictures of a smaller one."""
        parts = (self.category, self.split, f"cfg{self.cfg:g}", self.method, self.anchor, self.code)
        return "_".join(p.replace(" ", "-") for p in parts if p)

    @property
    def source(self) -> Sequence[RarePrompt]:
        """What it goes round."""
        return rareshapes.prompts(self.category, self.split)

    def prompt(self, i: int) -> RarePrompt:
        """Of the i-th picture."""
        prompts = self.source
        return prompts[i % len(prompts)]

    def text(self, i: int) -> str:
        """What the model is told for the i-th picture."""
        return self.prompt(i).text

    def seed(self, i: int) -> int:
        """Of the i-th picture: a function of its prompt and of how often the prompt came before."""
        repeat = i // len(self.source)
        return zlib.crc32(f"{self.prompt(i).text}, {repeat}".encode())

    @property
    def prompts(self) -> list[RarePrompt]:
        return [self.prompt(i) for i in range(self.n)]


class Unprompted(Cell):
    """The same pictures painted from nothing: the seeds of the prompts that the model is not told."""

    def text(self, i: int) -> str:
        return ""


@dataclass(frozen=True)
class Job:
    """One batch of a cell, pictures ``first`` to ``last`` (exclusive); ``more`` goes to ``Painter.paint`` as it is."""

    cell: Cell
    methods: Methods | None
    first: int
    last: int
    more: Mapping[str, Any] = field(default_factory=dict)


def jobs(cell: Cell, methods: Methods | None = None, **more: Any) -> list[Job]:
    return [Job(cell, methods, first, min(first + BATCH, cell.n), more) for first in range(0, cell.n, BATCH)]


@functools.cache
def essence(code: str) -> str:
    """Python code without comments, docstrings and blank lines: the same on every version of Python, unlike a tree."""
    code = textwrap.dedent(code)
    lines = code.splitlines()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            said = node.body[0]
            lines[said.lineno - 1:said.end_lineno] = [""] * (said.end_lineno - said.lineno + 1)
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def code_digest() -> str:
    """Of CODE: its :func:`essence`."""
    texts = [essence((ROOT / file).read_text(encoding="utf-8")) for file in CODE]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def code_of(parts: Sequence[Any]) -> str:
    """What methods and a solver (dataclasses: their settings and files; functions: their files) add to what a store's
    folder stands for, 8 hex digits; '' for nothing. So a changed method costs its own pictures and no others."""
    if not parts:
        return ""
    files: set[Path] = set()
    inside = [value for part in parts for value in vars(part).values() if is_dataclass(value)]
    for part in (*parts, *inside):
        collect(Path(sys.modules[part.__module__].__file__).resolve(), files)
    texts = [essence(f.read_text(encoding="utf-8")) for f in sorted(files)]
    settings = re.sub(r" at 0x[0-9a-f]+", "", repr(parts))
    return hashlib.sha256("\n".join([settings, *texts]).encode()).hexdigest()[:8]


def collect(file: Path, found: set[Path]) -> None:
    """``file`` and what it imports from the folders of pure methods, without what CODE holds."""
    if file in found or not file.is_file() or file.relative_to(ROOT).as_posix() in CODE:
        return
    found.add(file)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = file.parents[node.level - 1] if node.level else ROOT
            path = base.joinpath(*(node.module or "").removeprefix("rudder.").split("."))
            names = [path.with_suffix(".py"), *(path / f"{alias.name}.py" for alias in node.names)]
            for name in names:
                if name.is_relative_to(ROOT) and name.relative_to(ROOT).parts[0] in PURE:
                    collect(name, found)


@contextmanager
def workplace(options: Options) -> Iterator[Path]:
    """The folder of all stores: the one asked for, one that is thrown away for a quick run, or the user's cache."""
    if options.work or not options.quick:
        cache = os.environ.get("RUDDER_CACHE") or Path.home() / ".cache" / "rudder"
        yield options.work or Path(cache) / "bench"
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def open_store(work: Path, file: Path, options: Options, table: str = "scores") -> Store:
    """The store of a model file at its own settings; 6 steps when quick. What is kept of its pictures is the table's,
    in a file of its own where the model is not a shipped one or the precision another.
    """
    painter = Painter(file, options.precision)
    settings = replace(painter.settings, steps=6) if options.quick else painter.settings
    usual = file.resolve().parent == MODELS.resolve() and options.precision == Options.precision
    name = f"{table}-{painter.name}" + ("" if usual else f"-{painter.digest}-{options.precision}")
    published = RESULTS / "kept"  # holds no rows of another number of pictures
    kept = None if options.kept == published and options.n else options.kept and options.kept / f"{name}.json"
    return Store(work, painter, settings, kept, writes=options.shard[1] == 1)


class Store:
    """The pictures of one model under one state of settings and code."""

    def __init__(self, work: Path, painter: Painter, settings: Settings, kept: Path | None = None, writes: bool = True):
        """``settings`` without its cfg, which is the cell's. ``kept``: the file of what was seen of finished pictures,
        in the store's folder when None; ``writes``: whether this process may change it."""
        self.painter, self.settings, self.code, self.commit = painter, settings, code_digest()[:12], commit()
        about = asdict(settings) | {"cfg": None, "precision": painter.precision, "list": rareshapes.digest()}
        state = json.dumps(about | {"code": self.code}, sort_keys=True)
        self.folder = work / f"{painter.digest}-{hashlib.sha256(state.encode()).hexdigest()[:12]}"
        self.kept = Kept(kept or self.folder / "kept.json", about | {"model": painter.digest}, writes)

    @property
    def about(self) -> str:
        """How pictures are sampled, for the notes of a table."""
        how = self.settings
        return f"{how.sampler}, {how.scheduler}, {how.steps} steps, {self.painter.precision}"

    def file(self, job: Job) -> Path:
        return self.folder / job.cell.key / f"{job.first:05d}-{job.last:05d}.png"

    def missing(self, all_jobs: Sequence[Job]) -> list[Job]:
        return [job for job in all_jobs if not self.file(job).is_file()]

    def there(self, job: Job, until: float) -> bool:
        """Whether its pictures are there, painted again where they are gone and it is before ``until``."""
        if self.missing([job]) and time.monotonic() < until:
            self.paint(job)
        return not self.missing([job])

    def paint(self, job: Job) -> float:
        """Make one batch and keep it. Returns the seconds that it took."""
        begun = time.perf_counter()
        index = range(job.first, job.last)
        texts = [job.cell.text(i) for i in index]
        seeds = [job.cell.seed(i) for i in index]
        anchors = [job.cell.prompt(i).anchors[job.cell.anchor] for i in index] if job.cell.anchor else ()
        settings = replace(self.settings, cfg=job.cell.cfg)
        made = self.painter.paint(texts, seeds, anchors, job.methods, settings, **job.more)
        about = {"prompts": texts, "anchors": list(anchors), "seeds": seeds,
                 "model": self.painter.name, "settings": asdict(settings), "method": job.cell.method,
                 "commit": self.commit, "evaluations": made.evaluations, "seconds": made.seconds,
                 "each": list(made.each)}
        text = PngImagePlugin.PngInfo()
        text.add_text("rudder", json.dumps(about))
        with whole(self.file(job)) as half:
            Image.fromarray(np.concatenate(list(made.images), axis=1)).save(half, "png", pnginfo=text)
        return time.perf_counter() - begun

    def batch(self, job: Job) -> tuple[np.ndarray, dict]:
        """Its pictures uint8 ``[n, 64, 64, 3]``, and what the file says about them."""
        with Image.open(self.file(job)) as strip:
            pixels = np.asarray(strip.convert("RGB"))
            return np.stack(np.split(pixels, job.last - job.first, axis=1)), json.loads(strip.text["rudder"])

    def read(self, cell: Cell) -> tuple[np.ndarray, list[dict]]:
        """The cell's pictures uint8 ``[n, 64, 64, 3]`` and what each of its batches says about itself."""
        images, about = zip(*map(self.batch, jobs(cell, None)))
        return np.concatenate(images), list(about)

    def row(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is kept under ``key``, or what ``make`` sees now: with ``right``, the marks in the order of painting."""
        if key not in self.kept.rows:
            self.kept.put(key, rounded(make()) | {"code": self.code, "commit": self.commit})
        return restored({k: v for k, v in self.kept.rows[key].items() if k not in ("code", "commit")})

    @property
    def older(self) -> list[str]:
        return self.kept.older(self.painter.name, self.code)

    def key(self, cell: Cell, tag: str) -> str:
        """Of what the judge of that ``tag`` sees in a cell."""
        return f"{cell.key} {cell.n} {tag}"

    def scores(self, cell: Cell, judge: Callable, tag: str) -> Scores:
        """The cell as ``judge`` reads it; remembered under the ``tag`` of that judge."""
        def seen() -> dict[str, Any]:
            images, about = self.read(cell)
            found = asdict(score(images, cell.prompts, judge)) | {
                "evaluations": statistics.fmean(batch["evaluations"] for batch in about),
                "seconds": statistics.median(batch["seconds"] for batch in about)}
            return {k: v for k, v in found.items() if k != "prompts"}

        return Scores(prompts=[p.text for p in cell.prompts], **self.row(self.key(cell, tag), seen))


@dataclass(frozen=True)
class Scores:
    """What a judge says of the n pictures of a cell, as lists of length n.

    Attributes:
        prompts: their texts, the clusters of intervals.
        right: 1 where everything that the prompt's ``success`` names is right, else 0.
        parts: 1, 0 or nan for each field of the judge's score.
        saturation: 0..1 (``measures.saturation``).
        diversity: mean over prompts of ``measures.diversity`` of their pictures' features; None when none has two.
        evaluations, seconds: for each picture; seconds are the median over batches.
    """

    prompts: list[str]
    right: list[float]
    parts: dict[str, list[float]]
    saturation: list[float]
    diversity: float | None
    evaluations: float = float("nan")
    seconds: float = float("nan")


def sheet(store: Store, rows: Mapping[str, Job], until: float, columns: int = 12) -> dict[str, Any]:
    """A contact sheet: the first pictures of each row's batch, and under 'prompts' their texts. Empty when a batch is
    gone and there is no time to paint it: the sheet of an earlier run is better than a part of one."""
    if not rows or not all(store.there(job, until) for job in rows.values()):
        return {}
    first = next(iter(rows.values()))
    texts = [first.cell.text(i) for i in range(first.first, first.last)][:columns]
    return {name: store.batch(job)[0][:columns] for name, job in rows.items()} | {"prompts": texts}


def score(images: np.ndarray, prompts: Sequence[RarePrompt], judge: Callable) -> Scores:
    """Judge pictures uint8 ``[n, 64, 64, 3]`` by what their prompts count as success."""
    pictures = torch.from_numpy(images).movedim(3, 1).float() / 255
    reading = judge(pictures)
    parts, right = marks(reading, prompts)
    texts = [p.text for p in prompts]
    groups = [[i for i, t in enumerate(texts) if t == text] for text in dict.fromkeys(texts)]
    spread = [measures.diversity(reading.features[group]) for group in groups if len(group) > 1]
    diversity = statistics.fmean(spread) if spread else None
    return Scores(texts, right, parts, measures.saturation(pictures).tolist(), diversity)


def sight_of(some: Sequence[Job], judge: Callable) -> Callable[[int, np.ndarray], dict[str, list[float]]]:
    """``Todo.seen`` of jobs whose pictures are one prompt each."""
    def seen(number: int, images: np.ndarray) -> dict[str, list[float]]:
        job = some[number]
        found = score(images, job.cell.prompts[job.first:job.last], judge)
        return {"right": found.right, "saturation": found.saturation}

    return seen


def marks(reading: Any, prompts: Sequence[RarePrompt]) -> tuple[dict[str, list[float]], list[float]]:
    """The fields of the judge's score, and 1 where all that a prompt counts as success is right, else 0."""
    parts = {name: values.tolist() for name, values in reading.score([p.truth for p in prompts]).items()}
    return parts, [float(all(parts[name][i] == 1 for name in p.success)) for i, p in enumerate(prompts)]


@dataclass(frozen=True)
class Todo:
    """A row of a table: its pictures, and the key under which what is seen of them is kept. ``seen``: of the pictures
    of the job of that number, ``right`` and other lists that the row has too; job after job they make the row's.
    ``what`` is the table's; ``paintable``: whether this clone has all that the pictures need."""

    store: Store
    key: str
    jobs: Sequence[Job]
    seen: Callable[[int, np.ndarray], dict[str, list[float]]]
    what: Any = None
    paintable: bool = True

    @classmethod
    def of(cls, store: Store, cell: Cell, some: Sequence[Job], judge: Callable, tag: str) -> Todo:
        """A single cell that is kept by ``Store.scores``."""
        return cls(store, store.key(cell, tag), some, sight_of(some, judge), cell)

    def check(self) -> None:
        """Whether a row that other code has painted is still true: its first batches are painted again, until there are
        marks of BATCH pictures, and a row is dropped that differs or that has none to tell by."""
        row, now = self.store.kept.rows.get(self.key), {"right": []}
        if row and row["code"] != self.store.code:
            for number, job in enumerate(self.jobs):
                if len(now["right"]) >= BATCH:
                    break
                if self.store.missing([job]):
                    self.store.paint(job)
                for name, values in self.seen(number, self.store.batch(job)[0]).items():
                    now.setdefault(name, []).extend(values)
            if now["right"] and agree(now, restored({name: row[name] for name in now})):
                self.store.kept.put(self.key, row | {"code": self.store.code})
            else:
                self.store.kept.drop(self.key)

    @property
    def kept(self) -> bool:
        return self.key in self.store.kept.rows

    @property
    def done(self) -> bool:
        return self.kept or not self.store.missing(self.jobs)


def done(rows: Sequence[Todo], options: Options, say: Callable = print) -> list[Todo]:
    """Paint what is neither kept nor painted, as far as the options go; returns what is there then."""
    for row in rows if options.check else ():
        if row.paintable and time.monotonic() < options.until:
            row.check()
    paint_all([(row.store, job) for row in rows if not row.kept for job in row.jobs], options.shard, say,
              options.until)
    return [row for row in rows if row.done]


def unpainted(missing: int) -> list[str]:
    """What the notes of a table say of rows that are missing."""
    return [f"{missing} rows are not painted yet: run the command again."] if missing else []


def digest_of_judge() -> str:
    """Of the judge's weights and of how it reads them."""
    from rudder.demo import judge

    code = essence(Path(judge.__file__).read_text(encoding="utf-8"))
    return hashlib.sha256(judge.DEFAULT.read_bytes() + code.encode()).hexdigest()[:12]


def tag_of(*parts: Any) -> str:
    """Of the judge, and of the modules and functions through which a table sees pictures."""
    texts = [essence(inspect.getsource(part)) for part in parts]
    return hashlib.sha256("\n".join([digest_of_judge(), *texts]).encode()).hexdigest()[:12]


def tag_of_scores() -> str:
    """Of what :func:`score` sees."""
    return tag_of(measures, score, marks)


def paint_all(
    work: Sequence[tuple[Store, Job]], shard: tuple[int, int], say: Callable = print, until: float = math.inf,
) -> None:  # fmt: skip
    """Paint what is missing of this shard's share, up to ``until``; others may paint theirs at the same time."""
    part, of = shard
    mine = [(store, job) for i, (store, job) in enumerate(work) if i % of == part and store.missing([job])]
    seconds = pictures = 0.0
    for done, (store, job) in enumerate(mine):
        if time.monotonic() >= until:
            break
        if store.missing([job]):  # another process may have been quicker
            seconds += store.paint(job)
            pictures += job.last - job.first
        if job is mine[-1][1] or mine[done + 1][1].cell.key != job.cell.key:
            left = (len(mine) - done - 1) * seconds / (done + 1)
            say(f"{store.painter.name} {job.cell.key}: {job.last} of {job.cell.n}; {pictures / max(seconds, 1e-9):.2f} "
                f"pictures/s, about {left / 60:.0f} minutes left", flush=True)
