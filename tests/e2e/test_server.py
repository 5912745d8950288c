"""The pack in the real server, met over HTTP and the websocket as the frontend does."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PACK = "comfyui-rudder"
WORKFLOWS = sorted((Path(__file__).parents[2] / "workflows").glob("*.json"))
FEW = 4


def ours(comfy) -> dict[str, dict]:
    return {name: node for name, node in comfy.object_info.items() if name.startswith("Rudder")}


def with_inputs(prompt: dict, class_type: str, **inputs) -> dict:
    """A copy of a prompt with some inputs of every node of a type changed."""
    changed = copy.deepcopy(prompt)
    nodes = [node for node in changed.values() if node["class_type"] == class_type]
    assert nodes, f"the workflow has no {class_type}"
    for node in nodes:
        node["inputs"].update(inputs)
    return changed


# ------------------------------------------------------------------------------------------------- the machinery


def test_a_core_graph_runs(comfy, tiny):
    run = asyncio.run(comfy.run(comfy.convert(tiny)))
    assert run.end == "execution_success"
    assert [p.shape for p in run.pictures] == [(48, 64, 3)] * 2
    assert (run.pictures[0] == (0x33, 0x66, 0x99)).all()


def test_dev_run_prints_the_pictures(dev, comfy, tiny, tmp_path):
    workflow = tmp_path / "tiny graph.json"
    workflow.write_text(json.dumps(tiny))
    done = dev_run(dev, [workflow, "--out", tmp_path / "pictures"])
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if line.endswith(".png")]
    assert sorted(map(str, (tmp_path / "pictures").iterdir())) == sorted(printed) and len(printed) == 2


def test_dev_run_fails_with_the_servers_reason(dev, tiny, tmp_path):
    tiny["nodes"][0]["widgets_values"][0] = 0
    workflow = tmp_path / "bad.json"
    workflow.write_text(json.dumps(tiny))
    done = dev_run(dev, [workflow, "--out", tmp_path / "pictures"])
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for words in ("EmptyImage (node 1), input width", "min", "ComfyUI's log"):
        assert words in done.stderr


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w["nodes"][0].update(type="RudderNoSuchNode"), "RudderNoSuchNode"),
        (lambda w: w.pop("links"), "could not be converted: .*links"),
        (lambda w: w["nodes"][1].update(type="ImageInvert", widgets_values=[]), "output"),
        (lambda w: w["nodes"][0].update(widgets_values=[64, 48, 2**30, 1]), "batch_size"),
    ],
    ids=["unknown node", "not a workflow", "no output", "out of range"],
)
def test_a_bad_graph_is_refused_with_a_reason(dev, comfy, tiny, change, says):
    change(tiny)
    with pytest.raises(dev.Problem, match=says):
        dev.run_prompt(comfy.address, comfy.convert(tiny))


def test_a_node_that_fails_is_named(dev, comfy, tiny):
    prompt = comfy.convert(tiny)
    prompt["2"]["inputs"]["filename_prefix"] = "../outside"
    with pytest.raises(dev.Problem, match=r"SaveImage \(node 2\) failed: .*outside"):
        dev.run_prompt(comfy.address, prompt)


def dev_run(dev, arguments: list) -> subprocess.CompletedProcess:
    """dev.py run in a process of its own, in this environment and on the tree under test."""
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import dev; from pathlib import Path; "
        "tree = Path(sys.argv.pop(1)); host = dev.Host(tree, Path(sys.executable), dev.tree_version(tree)); "
        "dev.find_host = lambda args: host; sys.exit(dev.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, dev.ROOT, os.environ["COMFYUI_PATH"], "run", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


# ------------------------------------------------------------------------------------------------- the pack


def test_our_nodes_are_there(comfy):
    assert ours(comfy), "no node whose id starts with Rudder: did the pack fail to import?"
    for name, node in ours(comfy).items():
        assert node["python_module"] == f"custom_nodes.{PACK}", name
        assert node["display_name"] != name and node["description"], name
        assert "rudder" in node["category"], name


def test_every_input_has_a_tooltip(comfy):
    for name, node in ours(comfy).items():
        for kind in ("required", "optional"):
            for key, (_, *options) in node["input"].get(kind, {}).items():
                assert options and options[0].get("tooltip"), f"{name}: input {key} has no tooltip"


def test_every_node_has_a_help_page(comfy):
    for name in ours(comfy):
        page = comfy.text(f"/extensions/{PACK}/docs/{name}.md")  # frontend: /extensions/<folder>/docs/<id>.md
        assert len(page) > 200 and "<html" not in page, name


def test_the_workflow_is_offered_as_a_template(comfy, rare_concept):
    assert "rare_concept" in comfy.get("/api/workflow_templates")[PACK]
    assert comfy.get(f"/api/workflow_templates/{PACK}/rare_concept.json") == rare_concept


def test_every_template_has_a_thumbnail(comfy, dev):
    for name in comfy.get("/api/workflow_templates")[PACK]:
        thumbnail = dev.NO_PROXY.open(f"http://{comfy.address}/api/workflow_templates/{PACK}/{name}.jpg")
        assert thumbnail.read(2) == b"\xff\xd8", f"{name}.jpg is not a JPEG"


def test_the_workflow_uses_only_nodes_that_exist(comfy, rare_concept):
    prompt = comfy.convert(rare_concept)
    assert {node["class_type"] for node in prompt.values()} <= set(comfy.object_info)
    assert {node["class_type"] for node in prompt.values()} & set(ours(comfy))


@pytest.fixture(scope="module")
def first(comfy, dev):
    """The workflow as a user runs it first."""
    return asyncio.run(comfy.run(comfy.convert(json.loads(dev.WORKFLOW.read_text(encoding="utf-8")))))


def test_the_workflow_makes_pictures_and_reports_progress(first):
    assert first.end == "execution_success", first.messages[-1]
    assert first.pictures and all(picture.std() > 1 for picture in first.pictures)
    steps = [data["value"] for data in first.of("progress")]
    assert len(steps) > 4 and {data["value"] == data["max"] for data in first.of("progress")} == {True, False}


def test_a_second_run_is_the_same_bit_for_bit(comfy, first, rare_concept):
    comfy.forget()
    again = with_inputs(comfy.convert(rare_concept), "SaveImage", filename_prefix="again")
    second = asyncio.run(comfy.run(again))
    assert second.end == "execution_success"
    samplers = {data["node"] for data in first.of("progress")}  # each message may be throttled, not all of a node's
    assert {data["node"] for data in second.of("progress")} == samplers, "the second run came from the cache"
    assert len(samplers) == 4
    assert len(second.pictures) == len(first.pictures)
    for one, other in zip(first.pictures, second.pictures):
        assert np.array_equal(one, other)


def test_another_seed_makes_another_picture(comfy, dev, first, rare_concept):
    prompt = comfy.convert(rare_concept)
    assert dev.set_seeds(prompt, 4711)
    other = asyncio.run(comfy.run(prompt))
    assert not np.array_equal(first.pictures[0], other.pictures[0])


def test_after_a_cancelled_run_the_server_is_healthy(comfy, dev, first, rare_concept):
    prompt = comfy.convert(rare_concept)
    dev.set_seeds(prompt, 4712)  # nothing of it is cached
    cancelled = asyncio.run(comfy.run(prompt, interrupt=True))
    assert cancelled.end == "execution_interrupted"
    assert len(cancelled.of("progress")) < len(first.of("progress"))
    assert not cancelled.pictures
    comfy.forget()
    healthy = asyncio.run(comfy.run(with_inputs(comfy.convert(rare_concept), "SaveImage", filename_prefix="healthy")))
    assert healthy.end == "execution_success"
    assert all(np.array_equal(one, other) for one, other in zip(first.pictures, healthy.pictures))


@pytest.mark.parametrize("name", [file.stem for file in WORKFLOWS])
def test_every_workflow_runs(comfy, dev, name):
    """As it is shipped, but for the number of steps: every sampler runs, and every node that shows something does."""
    prompt = comfy.convert(json.loads((dev.ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8")))
    for node in prompt.values():
        if isinstance(node["inputs"].get("steps"), int):
            node["inputs"]["steps"] = FEW
    run = asyncio.run(comfy.run(prompt))
    assert run.end == "execution_success", run.messages[-1]
    samplers = {number for number, node in prompt.items() if node["class_type"] in ("KSampler", "SamplerCustom")}
    assert samplers and samplers <= {data["node"] for data in run.of("executing")}
    shown = {number for number, node in prompt.items() if comfy.object_info[node["class_type"]]["output_node"]}
    assert shown and shown == {number for number, output in run.history["outputs"].items() if any(output.values())}


# ------------------------------------------------------------------------------------------------- bad input


def test_a_value_out_of_range_is_refused_by_name(comfy, dev, rare_concept):
    prompt = comfy.convert(rare_concept)
    floats = [
        (number, name, node["inputs"][name])
        for number, node in prompt.items()
        if node["class_type"] in ours(comfy)
        for name, spec in comfy.object_info[node["class_type"]]["input"].get("required", {}).items()
        if spec[0] == "FLOAT" and isinstance(node["inputs"].get(name), (int, float))
    ]
    assert floats, "the workflow sets no number on any of our nodes"
    for number, name, _ in floats:
        bad = copy.deepcopy(prompt)
        bad[number]["inputs"][name] = -12345678.0
        answer = comfy.submit(bad)
        assert number in answer["node_errors"], answer
        assert name in dev.refusal(answer) and bad[number]["class_type"] in dev.refusal(answer)


def test_a_wrong_type_of_link_is_refused(comfy, dev, rare_concept):
    prompt = comfy.convert(rare_concept)
    number, name = next(
        (number, name)
        for number, node in prompt.items()
        if node["class_type"] in ours(comfy)
        for name, spec in comfy.object_info[node["class_type"]]["input"].get("required", {}).items()
        if spec[0] == "MODEL" and isinstance(node["inputs"].get(name), list)
    )
    clip = next(k for k, node in prompt.items() if node["class_type"] == "CLIPTextEncode")
    prompt[number]["inputs"][name] = [clip, 0]
    answer = comfy.submit(prompt)
    assert "CONDITIONING" in dev.refusal(answer) and name in dev.refusal(answer)


def test_zero_steps_are_refused(comfy, dev, rare_concept):
    answer = comfy.submit(with_inputs(comfy.convert(rare_concept), "KSampler", steps=0))
    assert "input steps" in dev.refusal(answer)
