"""COMPOSITION.md is what the method classes say today."""

from __future__ import annotations

from itertools import permutations

from rudder.bench import ROOT
from rudder.bench.composition import PAGE, classes, order, page, refusal, stages, undecided


def test_the_page_is_not_stale():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python3 dev.py matrix`"


COMMUTE = {  # what is allowed without an order of its own, and why the wiring cannot matter
    frozenset({"LinearAG", "LimitedInterval"}): "a gate leaves the weight or ends guidance, and LinearAG remembers "
    "only what was evaluated",
}


def test_the_wiring_decides_nothing():
    """test_pairs runs every pair in both wirings; this finds those whose order nobody thought about."""
    assert {frozenset(kind.__name__ for kind in pair) for pair in undecided()} <= set(COMMUTE)


def test_every_method_acts_somewhere():
    assert len(classes()) >= 15
    assert all(stages(kind) for kind in classes())
    assert len({kind.title for kind in classes()}) == len(classes())


def test_pairs_are_told_as_they_run():
    kinds = {kind.__name__: kind for kind in classes()}
    assert order(kinds["TAG"], kinds["APG"]) == order(kinds["APG"], kinds["TAG"])
    assert order(kinds["Schedule"], kinds["CFG"]) == "weight: Guidance Weight (CFG), then Guidance Schedule"
    said = refusal(kinds["APG"], kinds["BetaCFG"])
    assert said.startswith("'Normalised Guidance (beta-CFG)' and 'High CFG without Burn (APG)' both decide the norm")
    for first in kinds.values():
        for second in kinds.values():
            assert bool(refusal(first, second)) == bool(refusal(second, first)) == bool(first.claims & second.claims)


def test_help_pages_name_what_a_node_excludes():
    texts = [file.read_text(encoding="utf-8").replace("\\*", "*") for file in (ROOT / "web" / "docs").glob("*.md")]
    pages = {text.splitlines()[0].removeprefix("# "): text for text in texts}
    kinds = [kind for kind in classes() if kind.title in pages]  # C-TAG and LinearAG are modes of another's node
    assert len(classes()) - len(kinds) == 2
    missing = [f"{a.title}: {b.title}" for a, b in permutations(kinds, 2)
               if refusal(a, b) and f"**{b.title}**" not in pages[a.title]]
    assert not missing
