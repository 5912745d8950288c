"""COMPOSITION.md: which guidance methods go together, and what happens. Written from the method classes themselves.

    python3 dev.py matrix
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil

from . import ROOT, prepare

PAGE = ROOT / "COMPOSITION.md"
STAGES = {  # the hooks in the order in which the executor runs them: what a user reads
    "scale": "weight", "left": "who", "latent": "latent", "sources": "prompt", "branches": "evaluation",
    "edits": "attention", "predicts_uncond": "negative", "refine": "predictions", "direction": "push", "term": "terms",
    "finish": "result",
}  # fmt: skip
HEAD = """# Which guidance methods go together, and what happens

Put any of them on one MODEL, in any order of wiring: the result is the same, bit for bit. At every step the stages run from left to right, and inside a stage the method with the lower rank goes first. Two methods that decide the same thing are refused when the second is wired, with both names and the way out.

*Written by `python3 dev.py matrix` from the methods' own code; a test fails when it is stale. Every pair, and a sample of triples, runs in the tests on a small UNet and a small Flux transformer (`tests/host/test_pairs.py`; `tests/host/test_edit_pairs.py` for the methods that need a batch of a source and its edits; triples without those: `tests/host/test_matrix.py`).*
"""  # noqa: E501
STAGES_TEXT = """
* **weight**: how strong guidance is at this step, and whether it acts at all
* **who**: which pictures of the batch guidance has left, while it goes on for the others
* **latent**: what the model sees in place of the sampler's latent
* **prompt**: which conditioning plays the positive
* **evaluation**: further predictions, in the one batched call of the step; AutoGuidance asks its second model right after it. What depends on an earlier answer (ANSWER, SAG) asks for more in the stage that needs it
* **attention**: what attention does inside that call
* **negative**: whether it is predicted instead of evaluated
* **predictions**: what the model said of the positive and of the negative
* **push**: their difference, before it is multiplied by the weight
* **terms**: what is added to the guided picture
* **result**: the picture of the step, after everything
"""  # noqa: E501
SAMPLERS_TEXT = """
## With Rudder's samplers

They stand at the other end of the graph, so there is no order of wiring. *Low Guidance Sampler (CFG++)* sets the guidance weight of every prediction itself, and so does *Reflection Sampler (W2SD)* for its weak side where that is a cfg: both refuse a MODEL that carries {setting}. A weak guider of its own has its own MODEL and nodes, and nothing is refused.

Every other method above acts under CFG++ as it does under CFG at the weight that its strength comes to at that step, and under W2SD in each of the predictions of a step (strong, weak, strong again) on the MODEL that it is wired to (`tests/host/test_samplers.py`: CFG++ with every method that needs no source and edits, W2SD with AAPB).
"""  # noqa: E501


def classes() -> list[type]:
    """Every guidance method of the pack, in the order in which the executor would run them."""
    from rudder import guidance
    from rudder.guidance.contract import Guidance
    from rudder.guidance.trace import Trace

    for module in pkgutil.iter_modules(guidance.__path__):
        importlib.import_module(f"{guidance.__name__}.{module.name}")

    def below(kind: type) -> set[type]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    ours = {kind for kind in below(Guidance) if kind.__module__.startswith(f"{guidance.__name__}.")}
    return sorted(ours - {Guidance, Trace}, key=lambda kind: (kind.rank, kind.title))


def stages(kind: type) -> list[str]:
    """The hooks that a method implements."""
    from rudder.guidance.contract import Guidance

    return [hook for hook in STAGES if getattr(kind, hook) is not getattr(Guidance, hook)]


def refusal(first: type, second: type) -> str | None:
    """What the user reads when ``second`` is wired after ``first``; None if they go together."""
    from rudder.guidance.contract import GuidanceError, extended

    try:
        extended((first,), second)  # reads titles and claims, which belong to the class
    except GuidanceError as error:
        return str(error)
    return None


def order(first: type, second: type) -> str:
    """Who acts when, stage by stage, with both methods on one MODEL."""
    acts = []
    for hook, name in STAGES.items():
        here = [kind.title for kind in sorted((first, second), key=lambda kind: kind.rank) if hook in stages(kind)]
        if here:
            acts.append(f"{name}: {', then '.join(here)}")
    return "; ".join(acts)


def page() -> str:
    """The whole page, from :func:`classes`."""
    kinds = classes()
    number = {kind: i for i, kind in enumerate(kinds, 1)}
    lines = [HEAD, "## The methods\n"]
    lines += [f"| | method | rank | {' | '.join(STAGES.values())} | decides alone |"]
    lines += [f"|---:|---|---:|{':---:|' * len(STAGES)}---|"]
    for kind in kinds:
        marks = " | ".join("●" if hook in stages(kind) else "" for hook in STAGES)
        lines.append(f"| {number[kind]} | {kind.title} | {kind.rank} | {marks} | {', '.join(sorted(kind.claims))} |")
    lines += [STAGES_TEXT, "## Every pair\n", "● they go together, ✕ refused. Numbers are those of the table above.\n"]
    lines += [f"| | | {' | '.join(map(str, number.values()))} |", f"|---:|---|{':---:|' * len(kinds)}"]
    for first in kinds:
        cells = " | ".join("✕" if refusal(first, second) else "●" for second in kinds)
        lines.append(f"| {number[first]} | {first.title} | {cells} |")
    lines.append("\n## What happens\n\nFor each method: with every other that is wired after it.\n")
    for first in kinds:
        lines.append(f"<details><summary>{number[first]}. {first.title}</summary>\n")
        for second in kinds:
            said = refusal(first, second)
            lines.append(f"* **{second.title}**: {f'refused. “{said}”' if said else order(first, second)}")
        lines.append("\n</details>\n")
    setting = [f"*{kind.title}*" for kind in kinds if "guidance weight" in kind.claims]
    lines.append(SAMPLERS_TEXT.format(setting=" or ".join(setting)).strip())
    return "\n".join(lines).rstrip() + "\n"


def undecided() -> list[tuple[type, type]]:
    """Pairs whose order inside a stage nothing but the wiring would decide: same stage, same rank, both allowed."""
    pairs = itertools.combinations(classes(), 2)
    ordered = {"scale", "edits", "refine", "direction", "finish"}  # each hands on what the one before made
    return [
        (a, b) for a, b in pairs
        if a.rank == b.rank and ordered & set(stages(a)) & set(stages(b)) and not refusal(a, b)
    ]


def main() -> None:
    prepare()
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
