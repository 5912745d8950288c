"""A part of the table `guidance`: how different the pictures of one prompt are, and at what price in right ones.

The table itself has many prompts and hardly two pictures of one, because that tells accuracy best. Here fewer prompts
are painted EACH times. Plain guidance and the limited interval, of which variety is expected, at every weight; the
other methods at one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import Options, Table, cells, guidance, seen, truth
from .cells import Cell, Store
from .guidance import CFGS, PLAIN, QUICK_CFGS, ROWS, Found
from .rareshapes import RarePrompt

EACH = 4  # pictures of a prompt
ALL_WEIGHTS = (PLAIN, "interval")
AT = CFGS[0]  # the others' weight
COLUMNS = {"model": ("model", ""), "method": ("method", ""), "cfg": ("cfg", "g"), "n": ("pictures", "d"),
           "diversity": ("diversity", ".3f"), "more diverse": ("above CFG's", "+.3f"),
           "accuracy": ("right, %", ".1f"), "more right": ("above CFG, points", "+.1f"),
           "evaluations": ("evaluations a picture", ".1f")}


class Varied(Cell):
    """EACH pictures of n / EACH prompts, each time round with new seeds."""

    @property
    def key(self) -> str:
        return f"{super().key}_each{EACH}of{self.n}"

    @property
    def source(self) -> Sequence[RarePrompt]:
        return super().source[:max(self.n // EACH, 1)]


def plan(quick: bool) -> list[tuple[str, float]]:
    """(method, cfg), the most important first."""
    first = [(key, cfg) for cfg in (QUICK_CFGS if quick else CFGS) for key in ALL_WEIGHTS if cfg in ROWS[key].at([cfg])]
    rest = [] if quick else [key for key, row in ROWS.items() if row.prompted and row.at([AT])]
    return first + [(key, AT) for key in rest if key not in ALL_WEIGHTS]


def part(stores: Sequence[Store], options: Options, n: int, reader: Callable, tag: str) -> tuple[Table, int]:
    """The table of what is there, and how many rows are missing."""
    from . import guidanceplots

    true = truth.Truth.of([p for cell in guidance.cells_of(PLAIN, 1.0, n, made=Varied) for p in cell.prompts], reader)
    todo = guidance.todos(plan(options.quick), stores, n, Varied, true, reader, tag)
    ready = cells.done(todo, options)
    found = guidance.found_of(ready, stores, true, reader, tag)
    about = [f"{EACH} pictures of each of {n // EACH} prompts, half frequent and half ordinary. Diversity: mean "
             "distance between the pictures of one prompt, of the judge's features; read it with accuracy, because "
             "wrong pictures are diverse. Differences are to CFG at the same cfg.",
             *front(found), *([] if options.quick else expectation(found))]
    table = Table("guidance-variety", "Variety: pictures of one prompt", COLUMNS, guidance.rows_of(found), about)
    table.plots = guidanceplots.saver({"diversity": guidanceplots.by_diversity(found)} if ready else {})
    return table, len(todo) - len(ready)


def front(found: Found) -> list[str]:
    """Which methods are on the front of accuracy against diversity, for each model."""
    out = []
    for model in found.models:
        of = {(ROWS[key].name, cfg): s for (key, cfg), s in found.of(model).items()}

        def freer(a, b, of=of) -> bool:
            return seen.more_right(of[a], of[b]).low > 0 and seen.more_diverse(of[a], of[b]).low > 0

        where = seen.standings({name: (s.accuracy, s.variety) for name, s in of.items()}, freer)
        out.append(f"Accuracy against diversity, {model}: {seen.told(where)}")
    return out


def expectation(found: Found) -> list[str]:
    """Against each weight of CFG, the interval at the weight that is as often right, as nearly as there is one."""
    out = []
    for model in found.models:
        of = found.of(model)
        plain, mine = ({cfg: s for (k, cfg), s in of.items() if k == key} for key in ALL_WEIGHTS)
        said = []
        for cfg in sorted(c for c in plain if c > 1 and mine):
            like = min(mine, key=lambda c: (abs(mine[c].accuracy - plain[cfg].accuracy), abs(c - cfg)))
            effect, right = seen.more_diverse(mine[like], plain[cfg]), seen.more_right(mine[like], plain[cfg])
            said.append(f"at {like:g} against CFG at {cfg:g}: diversity {effect:+.3f}, accuracy {right:+.1f} points: "
                        f"{seen.verdict(effect, 0, right)}")
        if said:
            out.append("Expected: the limited interval is more diverse at equal accuracy, at the weight nearest in it "
                       f"on these pictures; {model}, {'; '.join(said)}.")
    return out
