"""Figures on help pages: what `bench/results` says, between two marks, so that no page can say anything else.

    <!-- measured guidance: APG -->               a row of `bench guidance`, against CFG
    <!-- measured guidance: TAG | C-TAG = low -->  several, with words of the page's own for one
    <!-- measured edit: MasaCtrl = this node -->   rows of `bench edit`, below the edited prompt alone
    <!-- /measured -->                             the end of each

Saving either table writes them; `python3 dev.py python -m bench.pages` does it without. A test fails when one is stale.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from . import RESULTS, ROOT

DOCS = ROOT / "web" / "docs"
MARK = re.compile(r"(<!-- measured (\w+): (.+?) -->\n).*?(<!-- /measured -->)", re.DOTALL)
MODELS = {"shapes-unet": "UNet", "shapes-flux": "Flux"}
KINDS = {"recolour": "recolour", "retexture": "retexture", "reshape": "reshape", "restyle": "background",
         "add": "add an object", "delete": "delete one"}


def value(x: Any, how: str) -> str:
    return format(x["value"] if isinstance(x, dict) else x, how)


def interval(x: dict, how: str) -> str:
    ends = "" if x["low"] is None else f" ({x['low']:{how}} .. {x['high']:{how}})"
    return f"{x['value']:{how}}{ends}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def guidance(found: dict, names: dict[str, str]) -> str:
    """Every weight of the named rows beside CFG's, on each model, and how different their pictures are."""
    weights, variety = ({(r["model"], r["method"], r.get("cfg")): r for r in part["rows"]}
                        for part in found["parts"][:2])
    floor = weights["", "true renders", None]
    out = [f"On the demo models (`python3 dev.py bench guidance`, {floor['n']} pictures a row of prompts that the "
           "models know, the same seeds, CFG with 25 steps of dpmpp_2m; 95 % intervals). *right*: shape and attribute, "
           f"as the judge reads them. Saturation of as many true renders: {value(floor['saturation'], '.3f')}. Frechet "
           "distance: lower is nearer to true renders."]
    for name, said in names.items():
        rows = []
        for model, short in MODELS.items():
            for cfg in sorted(c for m, n, c in weights if m == model and n == name and (m, "CFG", c) in weights):
                mine, plain = weights[model, name, cfg], weights[model, "CFG", cfg]
                if "more right" not in mine:
                    continue
                pair = [value(row[key], how) for key, how in (("accuracy", ".0f"), ("saturation", ".3f"),
                                                               ("frechet", ".0f")) for row in (plain, mine)]
                rows.append([f"{short}, cfg {cfg:g}", *pair[:2], interval(mine["more right"], "+.0f"), *pair[2:],
                             interval(mine["farther"], "+.0f"), f"{mine['evaluations']:.0f}"])
        out += [f"**{said}**"] * (len(names) > 1)
        out.append(table(["", "right, %: CFG", "this node", "difference, points", "saturation: CFG", "this node",
                          "Frechet: CFG", "this node", "difference", "evaluations a picture"], rows))
        told = []
        for model, short in MODELS.items():
            for cfg in sorted(c for m, n, c in variety if (m, n) == (model, name) and (m, "CFG", c) in variety):
                mine, plain = variety[model, name, cfg], variety[model, "CFG", cfg]
                told.append(f"{short} at {cfg:g} {value(mine['diversity'], '.2f')} (CFG "
                            f"{value(plain['diversity'], '.2f')}; {interval(mine['more diverse'], '+.2f')})")
        if told:
            true = value(variety["", "true renders", None]["diversity"], ".2f")
            out.append(f"Variety, the distance between pictures of one prompt (true renders {true}): "
                       f"{'; '.join(told)}.")
    return "\n\n".join(out)


def edit(found: dict, names: dict[str, str]) -> str:
    """Success and what is kept, of every kind of edit on each model."""
    at = {(r["model"], r["kind"], r["method"]): r for r in found["rows"]}
    counts = sorted({r["n"] for r in found["rows"] if r["kind"] in KINDS})
    if not counts:
        return "Not measured yet: `python3 dev.py bench edit`."

    def told(row: dict | None) -> str:
        return f"{value(row['success'], '.0f')}, {value(row['psnr'], '.1f')}" if row and "psnr" in row else ""

    rows = [[f"{short}: {said}", *(told(at.get((model, kind, name))) for kind in KINDS)]
            for model, short in MODELS.items() if any(key[0] == model for key in at)
            for name, said in {"edited prompt, same seed": "prompt alone", **names}.items()]
    about = (f"On the demo models (`python3 dev.py bench edit`, {counts[0]} to {counts[-1]} edits a cell, judged "
             "against the world's truth), beside the edited prompt alone from the same noise: success in %, then the "
             "PSNR of what must stay, dB.")
    return f"{about}\n\n{table(['', *KINDS.values()], rows)}"


TABLES = {"guidance": guidance, "edit": edit}


@cache
def results(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def filled(text: str) -> str:
    """A page with every mark's figures."""
    def told(match: re.Match) -> str:
        begin, name, which, end = match.groups()
        names = dict(part.split(" = ") if " = " in part else (part, part) for part in which.split(" | "))
        return f"{begin}\n{TABLES[name](results(name), names)}\n\n{end}"

    return MARK.sub(told, text)


def stale() -> dict[Path, str]:
    """The pages that say something else than the results, and what they should say."""
    texts = {file: file.read_text(encoding="utf-8") for file in sorted(DOCS.glob("*.md"))}
    return {file: new for file, text in texts.items() if (new := filled(text)) != text}


def write() -> None:
    for file, text in stale().items():
        file.write_text(text, encoding="utf-8")
        print(f"{file.relative_to(ROOT)} has new figures")


if __name__ == "__main__":
    write()
