"""What was seen of pictures that may be gone: one JSON file for each table and model, committed with the results.

Painting takes hours, and a cache is lost with its machine. So the judge's marks of every finished row are kept (the
pictures are not: marks are a thousandth of their size), and a table grows from session to session. A file belongs to
one model, its settings and the list of prompts: of anything else it is started anew. A row belongs to its method's
settings and code and to the judge, which are in its key. That the code of the host's side is still the same cannot be
read off a digest, because nearly every change leaves all pictures as they were: so each row names the code that painted
it, and `--check` paints its first pictures again, until there are 32 marks, and drops the row if something else is
seen in them now: another mark, or another saturation or PSNR, which tell methods apart that marks do not.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOM = 2  # of 32 pictures that may differ: another processor rounds otherwise


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``file`` at the end: nobody reads a half-written one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_suffix(f".{os.getpid()}.part{file.suffix}")
    yield half
    half.replace(file)


class Kept:
    """Rows by key, each a JSON object with ``right`` (marks in the order of painting), ``code`` and ``commit``."""

    def __init__(self, file: Path, about: dict[str, Any], writes: bool = True):
        """``about``: what all rows have in common. ``writes``: whether ``put`` and ``drop`` reach the file: not where
        several processes share the work."""
        self.file, self.about, self.writes = file, about, writes
        saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self.rows: dict[str, dict[str, Any]] = saved["rows"] if saved.get("about") == about else {}

    def put(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = row
        self.save()

    def drop(self, key: str) -> None:
        del self.rows[key]
        self.save()

    def older(self, name: str, code: str) -> list[str]:
        """A sentence about rows of ``name`` that other code than ``code`` has painted, for the notes of a table."""
        old = sorted({row["commit"] for row in self.rows.values() if row["code"] != code})
        return [f"{name}: rows painted at earlier commits ({', '.join(old)}); their methods' files are the same, or "
                "gave the same pictures; `--check` looks again."] if old else []

    def save(self) -> None:
        if self.writes:
            rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in self.rows.items())
            with whole(self.file) as half:  # a row a line
                half.write_text(f'{{"about": {json.dumps(self.about)}, "rows": {{\n{rows}\n}}}}\n', encoding="utf-8")


def agree(now: Mapping[str, Sequence[float]], then: Mapping[str, Sequence[float]]) -> bool:
    """Whether what is seen of some pictures, list by list, is the beginning of what a row has, but for ROOM of them."""
    def same(a: float, b: float) -> bool:
        return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-4) or a != a and b != b

    return all(sum(not same(*both) for both in zip(now[name], then[name])) <= ROOM * len(now[name]) / 32
               for name in now)


def rounded(value: Any) -> Any:
    """Numbers as a table needs them: five digits; nan as None, which JSON knows."""
    if isinstance(value, float):
        return None if value != value else float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value


def restored(value: Any) -> Any:
    """``rounded`` undone for lists of numbers: None is nan again."""
    if isinstance(value, dict):
        return {k: restored(v) for k, v in value.items()}
    return [float("nan") if v is None else restored(v) for v in value] if isinstance(value, list) else value
