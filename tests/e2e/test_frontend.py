"""What the pack gives the browser: the drawing of the schedule and the subgraph blueprints, as a user meets them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import pytest

PACK = "comfyui-rudder"
WORKFLOWS = Path(__file__).parents[2] / "workflows"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
READY = "!!(window.app?.graph && window.LiteGraph?.registered_node_types?.RudderGuidanceSchedule)"
DRAWN = """(async () => {
  const make = () => {
    const node = LiteGraph.createNode("RudderGuidanceSchedule")
    app.graph.add(node)
    return node
  }
  const line = (node) => node.widgets.at(-1).element.querySelectorAll("path")[1].getAttribute("d")
  const title = (node) => node.widgets.at(-1).element.querySelector("span").textContent
  const set = (node, name, value) => {
    const widget = node.widgets.find((one) => one.name === name)
    widget.value = value
    widget.callback?.(value, app.canvas, node)
  }
  app.graph.clear()
  const node = make(), other = make(), first = line(node), said = title(node)
  set(node, "shape", "step")
  set(node, "start_percent", 0.5)
  const second = line(node), untouched = line(other) === first
  const saved = JSON.parse(JSON.stringify(app.graph.serialize()))
  const prompt = (await app.graphToPrompt()).output
  await app.loadGraphData(saved)
  const again = app.graph.serialize()
  const loaded = app.graph.getNodeById(node.id)
  return {
    first, second, said, untouched, reloaded: line(loaded), widgets: loaded.widgets.map((one) => one.name),
    values: saved.nodes.map((one) => one.widgets_values), values_again: again.nodes.map((one) => one.widgets_values),
    inputs: Object.keys(prompt[node.id].inputs),
  }
})()"""


HIDDEN = """(async (workflows) => {
  const hidden = []
  for (const [name, workflow] of Object.entries(workflows)) {
    await app.loadGraphData(workflow)
    await new Promise((resolve) => setTimeout(resolve, 500))  // what is drawn may make a node higher
    const boxes = app.graph._nodes.map((node) => ({
      name: `${node.id} (${node.type})`, left: node.pos[0], right: node.pos[0] + node.size[0],
      top: node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT, bottom: node.pos[1] + node.size[1],
    }))
    boxes.forEach((a, index) => boxes.slice(index + 1).forEach((b) => {
      if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)
        hidden.push(`${name}: ${a.name} and ${b.name}`)
    }))
  }
  return hidden
})(%s)"""


async def evaluate(socket: aiohttp.ClientWebSocketResponse, expression: str) -> Any:
    """The value of a JavaScript expression in the page, None where the page went away meanwhile."""
    arguments = {"expression": expression, "awaitPromise": True, "returnByValue": True}
    await socket.send_json({"id": 1, "method": "Runtime.evaluate", "params": arguments})
    async for frame in socket:
        message = json.loads(frame.data)
        if message.get("id") == 1:
            answer = message.get("result", {})
            assert "exceptionDetails" not in answer, answer
            return answer.get("result", {}).get("value")
    raise AssertionError("the browser closed the connection")


async def in_browser(address: str, script: str, profile) -> Any:
    """The value of an expression in the page of a real ComfyUI, by Chromium's own debugging protocol."""
    switches = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
    command = [BROWSER, *switches, f"--user-data-dir={profile}", f"http://{address}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (profile / "DevToolsActivePort").exists():
            assert process.poll() is None, "the browser ended"
            await asyncio.sleep(0.2)
        port = (profile / "DevToolsActivePort").read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            pages = []
            while not pages:
                async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                    pages = [page for page in await answer.json() if address in page["url"]]
                await asyncio.sleep(0.5)
            async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                while not await evaluate(socket, READY):  # also an error while the page loads: its context is replaced
                    await asyncio.sleep(0.5)
                return await evaluate(socket, script)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_the_schedule_is_drawn_in_the_node_and_leaves_no_trace(comfy, tmp_path):
    found = asyncio.run(asyncio.wait_for(in_browser(comfy.address, DRAWN, tmp_path), 240))
    assert found["first"].startswith("M") and found["second"] not in ("", found["first"]) and found["untouched"]
    assert "× 2 at most" in found["said"]
    assert found["reloaded"] == found["second"]
    required = comfy.object_info["RudderGuidanceSchedule"]["input"]["required"]
    widgets = [name for name in required if name != "model"]
    assert found["widgets"] == [*widgets, "rudder_curve"] and found["inputs"] == widgets
    assert [len(values) for values in found["values"]] == [len(widgets)] * 2
    assert found["values"] == found["values_again"]


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_nodes_that_fit_get_no_new_seed_at_each_queue(comfy, tmp_path):
    """A widget 'control after generate' would change it, and the work would be done again."""
    script = """["RudderFitLinearAG", "RudderTrainTimePredictor", "KSampler"].map(
      (type) => LiteGraph.createNode(type).widgets.map(({ name }) => name).filter((name) => /control/.test(name)))"""
    fit, train, sampler = asyncio.run(asyncio.wait_for(in_browser(comfy.address, script, tmp_path), 240))
    assert (fit, train) == ([], []) and sampler, "the sampler has one"


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_no_node_of_a_workflow_covers_another(comfy, tmp_path):
    workflows = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in WORKFLOWS.glob("*.json")}
    assert workflows
    script = HIDDEN % json.dumps(workflows)
    assert not asyncio.run(asyncio.wait_for(in_browser(comfy.address, script, tmp_path), 480))


def test_the_script_is_served_and_listed(comfy):
    listed = comfy.get("/extensions")
    for name in ("schedule.js", "curve.js"):
        assert f"/extensions/{PACK}/{name}" in listed
    assert 'from "./curve.js"' in comfy.text(f"/extensions/{PACK}/schedule.js")


# ------------------------------------------------------------------------------------------------- blueprints


def blueprints(comfy) -> dict[str, dict]:
    listed = comfy.get("/global_subgraphs")
    ours = {key: entry["name"] for key, entry in listed.items() if entry["info"]["node_pack"].endswith(PACK)}
    return {name: json.loads(comfy.get(f"/global_subgraphs/{key}")["data"]) for key, name in ours.items()}


def in_a_graph(blueprint: dict) -> dict:
    """The blueprint between the demo model and a sampler, as a workflow that the frontend could have saved."""
    outer = blueprint["nodes"][0]
    names = [given["name"] for given in outer["inputs"]]
    nodes, links = [outer], []

    def add(kind: str, outputs: list[str], values: list, *inputs: str) -> dict:
        node = {"id": 100 + len(nodes), "type": kind, "mode": 0, "widgets_values": values, "properties": {},
                "inputs": [{"name": name, "type": "*", "link": None} for name in inputs],
                "outputs": [{"name": name, "type": name, "links": []} for name in outputs]}  # fmt: skip
        nodes.append(node)
        return node

    def wire(source: dict, slot: int, target: dict, name: str) -> None:
        place = [given["name"] for given in target["inputs"]].index(name)
        links.append([len(links) + 1, source["id"], slot, target["id"], place, source["outputs"][slot]["type"]])
        target["inputs"][place]["link"] = len(links)
        source["outputs"][slot].setdefault("links", []).append(len(links))

    demo = add("RudderLoadDemo", ["MODEL", "CLIP", "VAE"], ["shapes-unet"])
    image = add("EmptyLatentImage", ["LATENT"], [64, 64, 1])
    sampler = add("KSampler", ["LATENT"], [1, "fixed", 4, 5.0, "euler", "normal", 1.0],
                  "model", "positive", "negative", "latent_image")  # fmt: skip
    decode = add("VAEDecode", ["IMAGE"], [], "samples", "vae")
    save = add("SaveImage", ["IMAGE"], ["blueprint"], "images")
    wire(demo, 0, outer, "model")
    wire(outer, 0, sampler, "model")
    for i, role in enumerate(("positive", "negative"), 1):
        if "clip" in names:
            wire(outer, i, sampler, role)
        else:
            text = add("CLIPTextEncode", ["CONDITIONING"], ["a red circle" if i == 1 else ""], "clip")
            wire(demo, 1, text, "clip")
            wire(text, 0, sampler, role)
    if "clip" in names:
        wire(demo, 1, outer, "clip")
    wire(image, 0, sampler, "latent_image")
    wire(sampler, 0, decode, "samples")
    wire(demo, 2, decode, "vae")
    wire(decode, 0, save, "images")
    return {**blueprint, "nodes": nodes, "links": links, "last_node_id": 200, "last_link_id": len(links)}


RECIPES = {
    "Rare Concept (AAPB)": {"RudderAAPB"},
    "High CFG without Burn": {"RudderCFG", "RudderAPG"},
    "Fast Guidance (Adaptive)": {"RudderCFG", "RudderAdaptiveGuidance"},
}


def test_every_blueprint_is_offered(comfy):
    assert set(blueprints(comfy)) == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_blueprint_fits_the_nodes_of_today(comfy, name):
    """Widget values are saved by position: a node that gains an input would shift them."""
    (graph,) = blueprints(comfy)[name]["definitions"]["subgraphs"]
    assert graph["name"] == name and graph["description"].endswith(".")
    for node in graph["nodes"]:
        given = comfy.object_info[node["type"]]["input"]
        fields = {**given.get("required", {}), **given.get("optional", {})}
        assert [one["name"] for one in node["inputs"]] == list(fields), node["type"]
        widgets = [one["name"] for one in node["inputs"] if "widget" in one]
        assert len(node["widgets_values"]) == len(widgets), node["type"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_blueprint_runs(comfy, name):
    prompt = comfy.convert(in_a_graph(blueprints(comfy)[name]))
    assert {node["class_type"] for node in prompt.values() if node["class_type"].startswith("Rudder")} == {
        "RudderLoadDemo", *RECIPES[name],
    }  # fmt: skip
    run = asyncio.run(comfy.run(prompt))
    assert run.end == "execution_success", run.messages[-1]
    assert len(run.pictures) == 1 and run.pictures[0].std() > 1
