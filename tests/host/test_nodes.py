"""The nodes as ComfyUI sees them: schemas, what they put on a MODEL, and a trace from sampler to picture and file."""

from __future__ import annotations

import asyncio
import json
import math
import re
from pathlib import Path

import folder_paths
import pytest
import torch
from comfy_api.latest import io
from comfy_execution.utils import CurrentNodeContext

from rudder.guidance.aapb import AAPB
from rudder.guidance.blend import FixedBlend
from rudder.guidance.cfg import CFG
from rudder.guidance.contract import GuidanceError
from rudder.guidance.interval import LimitedInterval
from rudder.guidance.r2f import R2F
from rudder.guidance.trace import QUANTITIES, Recorder, Trace
from rudder.host import plan_of
from rudder.nodes import NODES, RudderExtension
from rudder.nodes.guidance import RudderAAPB, RudderCFG, RudderFixedBlend, RudderLimitedInterval, RudderR2F
from rudder.nodes.trace import RudderSaveTrace, RudderTrace, RudderTracePlot, recorded

from .models import conditioning, sample, tiny_unet

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
every_node = pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)


def call(node: type[io.ComfyNode], prompt: dict | None = None, unique_id: str | None = None, **inputs) -> tuple:
    """Execute a node as the host does, with the schema's defaults for what is not given. Its outputs."""
    defaults = {i.id: i.default for i in node.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}
    clone = node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.prompt: prompt, io.Hidden.unique_id: unique_id}})
    return clone.EXECUTE_NORMALIZED(**{**defaults, **inputs}).args


@pytest.fixture(scope="module")
def model():
    """One for all tests of this file: no node may change it."""
    unet = tiny_unet()
    yield unet
    assert plan_of(unet.model_options) == () and unet.model_options == tiny_unet().model_options


# ---------------------------------------------------------------- schemas


def test_comfyui_gets_every_node():
    nodes = asyncio.run(RudderExtension().get_node_list())
    assert nodes == list(NODES)
    ids = [node.GET_SCHEMA().node_id for node in nodes]
    assert len(set(ids)) == len({node.GET_SCHEMA().display_name for node in nodes}) == len(ids)


@every_node
def test_a_schema_tells_the_user_everything(node):
    schema = node.GET_SCHEMA()
    assert schema.node_id == node.__name__ and schema.node_id.startswith("Rudder")
    assert schema.display_name and not schema.display_name.startswith("Rudder")
    assert schema.category.split("/")[-1] == "rudder" and schema.category.count("/") >= 1
    assert len(schema.description) > 40 and schema.description.endswith(".")
    assert schema.search_aliases and schema.display_name not in schema.search_aliases
    for given in schema.inputs:
        assert given.tooltip and len(given.tooltip) > 10, f"{given.id} has no tooltip"
        assert given.tooltip.rstrip().endswith("."), f"{given.id}: the tooltip ends in mid-sentence"
    assert schema.outputs


@every_node
def test_defaults_are_valid(node):
    for given in node.GET_SCHEMA().inputs:
        if isinstance(given, (io.Int.Input, io.Float.Input)):
            assert given.min <= given.default <= given.max, given.id
            steps = (given.default - given.min) / (given.step or 1)
            assert math.isclose(steps, round(steps), abs_tol=1e-6), f"{given.id}: the widget would round its default"
        if isinstance(given, io.Combo.Input):
            assert given.default in given.options, given.id
            assert len(set(given.options)) == len(given.options)


@every_node
def test_the_old_and_the_new_object_info_can_be_built(node):
    info = node.GET_NODE_INFO_V1()
    assert json.loads(json.dumps(info if isinstance(info, dict) else vars(info)))["name"] == node.__name__
    assert node.INPUT_TYPES() and node.RETURN_TYPES


@every_node
def test_a_node_has_a_help_page(node):
    page = ROOT / "web" / "docs" / f"{node.__name__}.md"
    assert page.is_file(), f"write {page.relative_to(ROOT)}"
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {node.GET_SCHEMA().display_name}\n")
    for given in node.GET_SCHEMA().inputs:
        assert given.id in text, f"{page.name} does not mention the input {given.id}"


def test_the_pictures_of_the_help_pages_exist():
    docs = ROOT / "web" / "docs"
    shown = {i for page in docs.glob("*.md") for i in re.findall(r"!\[.*?\]\((.+?)\)", page.read_text("utf-8"))}
    assert not {image for image in shown if not (docs / image).is_file()}


def test_no_help_page_is_left_of_a_node_that_is_gone():
    pages = {page.stem for page in (ROOT / "web" / "docs").glob("Rudder*.md")}
    assert pages <= {node.__name__ for node in NODES}


@every_node
def test_a_node_appears_in_a_workflow(node):
    assert any(f'"{node.__name__}"' in file.read_text(encoding="utf-8") for file in WORKFLOWS)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_uses_only_nodes_and_inputs_that_exist(file):
    by_id = {node.__name__: node.GET_SCHEMA() for node in NODES}
    used = [node for node in json.loads(file.read_text(encoding="utf-8"))["nodes"] if node["type"].startswith("Rudder")]
    assert used, "a workflow of the pack without a node of the pack"
    for node in used:
        assert node["type"] in by_id
        known = {given.id for given in by_id[node["type"]].inputs}
        assert {entry["name"] for entry in node.get("inputs", [])} <= known, node["type"]


# ---------------------------------------------------------------- guidance nodes

ANCHOR = conditioning(3)
CASES = {
    "AAPB": (RudderAAPB, {"anchor": ANCHOR}, AAPB, {"clamp": True}),
    "AAPB unclamped": (RudderAAPB, {"anchor": ANCHOR, "gamma": "adaptive unclamped"}, AAPB, {"clamp": False}),
    "AAPB fixed": (RudderAAPB, {"anchor": ANCHOR, "gamma": "fixed", "fixed_gamma": 0.25}, FixedBlend, {"gamma": 0.25}),
    "fixed blend": (RudderFixedBlend, {"anchor": ANCHOR, "gamma": 0.7}, FixedBlend, {"gamma": 0.7}),
    "R2F": (RudderR2F, {"frequent": ANCHOR}, R2F, {"stop": 0.6, "mode": "alternate", "amount": 0.3}),
    "R2F SDXL": (RudderR2F, {"frequent": ANCHOR, "family": "SDXL", "level": 2}, R2F, {"stop": 0.1}),
    "R2F blend": (RudderR2F, {"frequent": ANCHOR, "mode": "blend", "level": 5, "blend_amount": 0.5}, R2F,
                  {"stop": 0.5, "mode": "blend", "amount": 0.5}),
    "R2F level 0": (RudderR2F, {"frequent": ANCHOR, "level": 0}, R2F, {"stop": 0.0}),
    "R2F stop": (RudderR2F, {"frequent": ANCHOR, "stop_percent": 0.33}, R2F, {"stop": 0.33}),
    "interval": (RudderLimitedInterval, {}, LimitedInterval, {"sigma_low": 0.28, "sigma_high": 5.42}),
    "interval in percent": (RudderLimitedInterval, {"start_percent": 0.2, "end_percent": 0.8}, LimitedInterval,
                            {"first": 0.2, "last": 0.8, "start": 0.0, "end": 1.0}),
    "CFG": (RudderCFG, {"weight": 3.5}, CFG, {"weight": 3.5}),
}


@pytest.mark.parametrize(("node", "inputs", "kind", "fields"), CASES.values(), ids=CASES)
def test_a_guidance_node_adds_its_method_to_a_clone(model, node, inputs, kind, fields):
    (patched,) = call(node, model=model, **inputs)
    (method,) = plan_of(patched.model_options)
    assert type(method) is kind
    assert {name: getattr(method, name) for name in fields} == pytest.approx(fields)
    for branch in method.prompts():
        assert getattr(branch, "prompt", branch).conditioning is ANCHOR  # never a copy: shared anchors cost once
    assert patched is not model and plan_of(model.model_options) == ()
    assert not model.model_options.get("transformer_options", {}).get("wrappers") and not model.wrappers
    assert plan_of(patched.clone().model_options) == (method,)


@pytest.mark.parametrize("case", ["AAPB", "AAPB fixed", "fixed blend", "CFG"])  # R2F has its stop instead
def test_the_window_of_a_node_reaches_its_method(model, case):
    node, inputs, _, _ = CASES[case]
    (patched,) = call(node, model=model, **inputs, start_percent=0.2, end_percent=0.8)
    (method,) = plan_of(patched.model_options)
    assert (method.start, method.end) == (0.2, 0.8)
    with pytest.raises(GuidanceError, match=re.escape(method.title) + ": start 0.8 and end 0.2"):
        call(node, model=model, **inputs, start_percent=0.8, end_percent=0.2)


def test_nodes_stack_in_wiring_order(model):
    (first,) = call(RudderCFG, model=model, weight=3.0)
    (second,) = call(RudderAAPB, model=first, anchor=ANCHOR)
    (third,) = call(RudderLimitedInterval, model=second)
    assert [type(method) for method in plan_of(third.model_options)] == [CFG, AAPB, LimitedInterval]
    assert [type(method) for method in plan_of(first.model_options)] == [CFG]
    with pytest.raises(GuidanceError, match=r"'Prompt Blend \(fixed\)' and 'Rare Concept Blend \(AAPB\)'"):
        call(RudderFixedBlend, model=third, anchor=conditioning(9))


@pytest.mark.parametrize("case", ["AAPB", "fixed blend", "R2F", "CFG"])
def test_a_node_changes_the_picture(model, case):
    """And the model it was given keeps making the old one."""
    node, inputs, _, _ = CASES[case]
    prompts = conditioning(1), conditioning(2)
    before = sample(model, "unet", *prompts, steps=2)
    (patched,) = call(node, model=model, **inputs)
    assert not torch.equal(sample(patched, "unet", *prompts, steps=2), before)
    assert torch.equal(sample(model, "unet", *prompts, steps=2), before)


# ---------------------------------------------------------------- the trace


def traced(model, batch: int = 1, steps: int = 3) -> Recorder:
    """The recorder of a run with AAPB, as a sampler node "7" makes it."""
    model, recorder = call(RudderTrace, model=call(RudderAAPB, model=model, anchor=ANCHOR)[0])
    with CurrentNodeContext("prompt", "7"):
        sample(model, "unet", conditioning(1), conditioning(2), batch=batch, steps=steps)
    return recorder


def test_the_trace_node_records_into_its_output(model):
    patched, recorder = call(RudderTrace, model=model)
    (method,) = plan_of(patched.model_options)
    assert isinstance(method, Trace) and method.recorder is recorder and recorder.runs == {}
    assert call(RudderTrace, model=model)[1] is not recorder
    assert RudderTrace.GET_SCHEMA().not_idempotent


def test_a_run_is_recorded_step_by_step_and_picture_by_picture(model):
    (run,) = traced(model, batch=2).runs.values()
    assert run["methods"] == ["Rare Concept Blend (AAPB)"] and run["cfg"] == 4.0 and run["evaluations"] == 9
    assert [step["index"] for step in run["steps"]] == [0, 1, 2]
    for step in run["steps"]:
        assert step["weight"] == 4.0 and step["evaluations"] == 3
        for name in ("gamma", "cosine", "guidance_norm", "cond_norm", "change_norm"):
            assert len(step[name]) == 2 and all(map(math.isfinite, step[name])), name


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("steps", [1, 3])
def test_from_sampler_to_plot(model, batch, steps):
    recorder = traced(model, batch, steps)
    pictures = [
        call(RudderTracePlot, trace=recorder, after=None, quantity=quantity, width=256, height=192)[0]
        for quantity in ("overview", *QUANTITIES)
    ]
    for picture in pictures:
        assert picture.shape == (1, 192, 256, 3) and picture.dtype == torch.float32
        assert picture.min() >= 0 and picture.max() == 1
        assert (picture.amax(-1) - picture.amin(-1) > 0.3).sum() > 30  # coloured ink: the line
    assert not torch.equal(pictures[0], pictures[1])


def test_a_plot_of_several_samplers(model):
    model, recorder = call(RudderTrace, model=model)
    for name, cfg in (("3", 4.0), ("5", 7.0)):
        with CurrentNodeContext("prompt", name):
            sample(model, "unet", conditioning(1), conditioning(2), cfg=cfg, steps=2)
    assert list(recorded(recorder, None)) == ["CFG 4", "CFG 7"]
    both = call(RudderTracePlot, prompt={"3": {}, "5": {}}, trace=recorder, after=None)[0]
    one = call(RudderTracePlot, prompt={"5": {}}, trace=recorder, after=None)[0]
    assert both.shape == one.shape == (1, 512, 768, 3) and not torch.equal(both, one)


def test_a_sampler_that_left_the_graph_leaves_the_plot():
    recorder = Recorder(runs={
        "15": {"methods": [], "cfg": 7.0, "steps": []}, "3": {"methods": [], "cfg": 4.0, "steps": []},
        "": {"methods": [], "cfg": 1.5, "steps": []},
    })
    assert list(recorded(recorder, {"15": {}, "8": {}})) == ["CFG 1.5", "CFG 7"]  # "" is a run outside of any graph
    assert list(recorded(recorder, None)) == ["CFG 1.5", "CFG 4", "CFG 7"]  # by node, not as they ran


def test_a_sampler_that_left_its_trace_leaves_the_plot():
    """It is still in the graph, and another MODEL is wired to it now."""
    run = {"methods": [], "cfg": 7.0, "steps": []}
    recorder = Recorder(runs={node: dict(run) for node in ("3", "5", "7:2", "9.0.4")}, node="2")
    prompt = {
        "1": {"inputs": {"name": "file"}}, "2": {"inputs": {"model": ["1", 0]}}, "9": {"inputs": {}},
        "4": {"inputs": {"model": ["2", 0], "numbers": [[1, 2], [3, 4]], "size": [64, 64]}},
        "3": {"inputs": {"model": ["4", 0], "cfg": 7.0}}, "5": {"inputs": {"model": ["1", 0]}},
        "7:1": {"inputs": {"model": ["4", 0]}}, "7:2": {"inputs": {"guider": ["7:1", 0]}},
    }
    assert len(recorded(recorder, prompt)) == 3, "the sampler 5 is not behind it; a loop's round cannot be told"
    with pytest.raises(ValueError, match="holds no run"):
        recorded(Recorder(runs={"5": run}, node="2"), prompt)
    assert call(RudderTrace, unique_id="2", model=tiny_unet())[1].node == "2"
    named = {"my.trace": {"inputs": {}}, "my.sampler": {"inputs": {"model": ["my.trace", 0]}}, "x.y": {"inputs": {}}}
    recorder = Recorder(runs={node: dict(run) for node in ("my.sampler", "x.y")}, node="my.trace")
    assert len(recorded(recorder, named)) == 1, "a prompt may name its nodes with dots"


def a_run(cfg: float, *methods: str) -> dict:
    step = {"index": 0, "sigma": 1.0, "weight": cfg}
    return {"methods": list(methods), "cfg": cfg, "steps": [step, {**step, "index": 1}]}


def test_several_traces_in_one_plot():
    first = Recorder(runs={"3": a_run(4.0), "5": a_run(4.0, "APG")})
    second, third = Recorder(runs={"7": a_run(7.0)}, name="flux"), Recorder(runs=first.runs | {"9": a_run(4.0)})
    more = {"trace_0": second, "trace_1": third}
    assert list(recorded(first, None, more)) == ["CFG 4", "APG", "flux", "CFG 4 #2"], "shared runs are shown once"
    second.runs["8"] = a_run(7.0, "APG")
    assert list(recorded(second, None)) == ["flux: CFG 7", "flux: APG"]
    assert list(recorded(first, None, more, "plain\n\nmine\n")) == ["plain", "APG", "mine", "flux: APG", "CFG 4"]
    alone = call(RudderTracePlot, trace=first, after=None)[0]
    over = call(RudderTracePlot, trace=first, after=None, more_traces={"trace_0": second}, more_after={})[0]
    assert not torch.equal(alone, over)


def test_several_traces_with_too_many_labels_or_an_empty_one():
    first = Recorder(runs={"3": a_run(4.0)})
    with pytest.raises(ValueError, match="'labels' has 2 lines and 1 runs were traced"):
        call(RudderTracePlot, trace=first, after=None, labels="a\nb")
    with pytest.raises(ValueError, match="The trace at 'trace_1' holds no run"):
        call(RudderSaveTrace, trace=first, after=None, more_traces={"trace_1": Recorder()})


def test_the_next_run_of_a_sampler_replaces_its_last(model):
    model, recorder = call(RudderTrace, model=model)
    for steps in (2, 4):
        with CurrentNodeContext("prompt", "3"):
            sample(model, "unet", conditioning(1), conditioning(2), steps=steps)
    (run,) = recorder.runs.values()
    assert len(run["steps"]) == 4


@pytest.mark.parametrize("recorder", [Recorder(), Recorder(runs={"3": {"methods": [], "cfg": 4.0, "steps": []}})])
@pytest.mark.parametrize(("node", "inputs"), [(RudderTracePlot, {}), (RudderSaveTrace, {})])
def test_an_empty_trace_says_what_to_wire(recorder, node, inputs):
    with pytest.raises(ValueError, match="'trace' holds no run. Wire the MODEL output of Guidance Trace"):
        call(node, prompt={"8": {}}, trace=recorder, after=None, **inputs)


@pytest.fixture
def output(tmp_path, monkeypatch):
    folder = tmp_path / "output"
    folder.mkdir()
    monkeypatch.setattr(folder_paths, "output_directory", str(folder))
    return folder


def test_a_saved_trace_is_json_in_the_output_folder(model, output):
    recorder = traced(model, batch=2)
    (text,) = call(RudderSaveTrace, trace=recorder, after=None)
    call(RudderSaveTrace, trace=recorder, after=None)
    files = sorted((output / "rudder").iterdir())
    assert [file.name for file in files] == ["trace_00001_.json", "trace_00002_.json"]

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    saved = json.loads(files[0].read_text(encoding="utf-8"), parse_constant=refuse)
    assert saved == json.loads(text) and list(saved) == ["Rare Concept Blend (AAPB)"]
    assert saved["Rare Concept Blend (AAPB)"]["steps"][0]["gamma"] == recorder.runs["7"]["steps"][0]["gamma"]


@pytest.mark.parametrize("prefix", ["../../x", "../x", "a/../../x", "/tmp/x", "..", "x", "", "%year%/x"])
def test_no_prefix_leaves_the_output_folder(output, prefix):
    recorder = Recorder(runs={"3": {"methods": [], "cfg": 4.0, "steps": []}})
    outside = sorted(file for file in output.parent.rglob("*") if output not in (file, *file.parents))
    try:
        call(RudderSaveTrace, trace=recorder, after=None, filename_prefix=prefix)
    except Exception as error:
        assert "outside the output folder" in str(error) and prefix.startswith(("..", "/", "a/.."))
    else:
        assert len(list(output.rglob("*.json"))) == 1
    assert outside == sorted(file for file in output.parent.rglob("*") if output not in (file, *file.parents))
    assert not Path("/tmp/x_00001_.json").exists()
