"""Help pages say what bench/results says."""

from __future__ import annotations

import json

from rudder.bench import RESULTS, pages


def test_no_page_is_stale():
    assert not pages.stale(), "run `python3 dev.py python -m bench.pages`"


def test_every_measured_method_is_on_a_page():
    text = "".join(file.read_text(encoding="utf-8") for file in pages.DOCS.glob("*.md"))
    marked = {part.split(" = ")[0] for _, name, which, _ in pages.MARK.findall(text) if name == "guidance"
              for part in which.split(" | ")}
    rows = json.loads((RESULTS / "guidance.json").read_text(encoding="utf-8"))["parts"][0]["rows"]
    measured = {row["method"] for row in rows if "more right" in row}
    assert measured and measured <= marked


def test_what_stands_between_the_marks_goes():
    page = "# A\n\n<!-- measured edit: MasaCtrl = this node -->\n99 %\n<!-- /measured -->\n\nSaid by hand.\n"
    filled = pages.filled(page)
    assert "99 %" not in filled and "| UNet: this node |" in filled and filled.endswith("\n\nSaid by hand.\n")
    assert pages.filled(filled) == filled


def test_a_half_painted_table_of_edits_leaves_cells_empty():
    plain = {"model": "shapes-unet", "kind": "add", "method": "edited prompt, same seed", "n": 3,
             "success": {"value": 50.0}, "psnr": {"value": 20.0}}
    page = pages.edit({"rows": [plain]}, {"MasaCtrl": "this node"})
    assert "| 50, 20.0 |" in page and page.splitlines()[-1] == "| UNet: this node |  |  |  |  |  |  |"
    assert "Not measured yet" in pages.edit({"rows": []}, {"MasaCtrl": "this node"})
