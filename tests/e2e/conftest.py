"""One real ComfyUI server for all end-to-end tests, of the tree in COMFYUI_PATH; it writes into a private folder."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from PIL import Image

if "COMFYUI_PATH" not in os.environ:
    raise pytest.UsageError("tests/e2e needs a ComfyUI tree in COMFYUI_PATH: run `python3 dev.py test tests/e2e`")

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds the fixture, so that the server ends too


@dataclass
class Run:
    """What the server said about one queued prompt."""

    messages: list[dict[str, Any]]
    history: dict[str, Any]
    pictures: list[np.ndarray]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [m["data"] for m in self.messages if m["type"] == kind]

    @property
    def end(self) -> str:
        return self.messages[-1]["type"]


class Client:
    """What a browser does with a ComfyUI server, without the browser."""

    def __init__(self, dev, address: str, output: Path) -> None:
        self.dev, self.address, self.output = dev, address, output
        self.object_info = self.get("/object_info")

    def get(self, path: str) -> Any:
        return self.dev.fetch(self.address, path)

    def post(self, path: str, body: dict[str, Any]) -> int:
        """The status of the answer (/free and /interrupt answer without JSON)."""
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = self.dev.urllib.request.Request(f"http://{self.address}{path}", data, headers)
        return self.dev.NO_PROXY.open(request, timeout=60).status

    def text(self, path: str) -> str:
        """The body at a path; an error status raises."""
        with self.dev.NO_PROXY.open(f"http://{self.address}{path}", timeout=60) as answer:
            return answer.read().decode()

    def convert(self, workflow: dict[str, Any]) -> dict[str, Any]:
        return self.dev.convert(Path(sys.executable), workflow, self.object_info)

    def submit(self, prompt: dict[str, Any], client: str = "nobody") -> dict[str, Any]:
        """The server's answer to a prompt, also when it refuses it."""
        return self.dev.fetch(self.address, "/prompt", {"prompt": prompt, "client_id": client})

    async def run(self, prompt: dict[str, Any], interrupt: bool = False) -> Run:
        """Queue a prompt and follow it over the websocket to its end; optionally interrupt it at its first progress."""
        client, messages = uuid.uuid4().hex, []
        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(f"http://{self.address}/ws?clientId={client}", max_msg_size=0) as socket:
                answer = self.submit(prompt, client)
                assert "prompt_id" in answer and not answer["node_errors"], self.dev.refusal(answer)
                async for frame in socket:
                    if frame.type is not aiohttp.WSMsgType.TEXT:
                        continue
                    message = json.loads(frame.data)
                    if message["data"].get("prompt_id") != answer["prompt_id"]:
                        continue
                    messages.append(message)
                    if interrupt and message["type"] == "progress":
                        interrupt = False
                        assert self.post("/interrupt", {}) == 200
                    if message["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                        break
        while not (history := self.get(f"/history/{answer['prompt_id']}")):
            pass
        history = history[answer["prompt_id"]]
        return Run(messages, history, self.pictures(history))

    def forget(self) -> None:
        """Empty ComfyUI's caches. It does so after the next prompt at the latest, so one is run."""
        assert self.post("/free", {"unload_models": True, "free_memory": True}) == 200
        image = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}}
        show = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
        assert asyncio.run(self.run({"1": image, "2": show})).end == "execution_success"

    def pictures(self, history: dict[str, Any]) -> list[np.ndarray]:
        """The pixels of every saved picture, in the order of node ids."""
        outputs = sorted(history["outputs"].items(), key=lambda item: int(item[0]))
        files = [f for _, o in outputs for f in o.get("images", ()) if f["type"] == "output"]
        return [np.asarray(Image.open(self.output / f["subfolder"] / f["filename"])) for f in files]


@pytest.fixture(scope="session")
def comfy(dev, tmp_path_factory):
    tree, folder = Path(os.environ["COMFYUI_PATH"]), tmp_path_factory.mktemp("server")
    host = dev.Host(tree, Path(sys.executable), dev.tree_version(tree))
    log = folder / "comfyui.log"
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(dev.server(host, folder / "base", folder / "output", log=log))
        except dev.Problem as problem:
            pytest.fail(f"{problem}\n{log.read_text(errors='replace')[-4000:]}", pytrace=False)
        client = Client(dev, server.address, folder / "output")
        yield client
        assert server.process.poll() is None, log.read_text(errors="replace")[-4000:]


@pytest.fixture
def tiny() -> dict[str, Any]:
    """A graph of core nodes only."""
    return json.loads((Path(__file__).parent / "data" / "tiny.json").read_text())


@pytest.fixture
def rare_concept(dev) -> dict[str, Any]:
    return json.loads(dev.WORKFLOW.read_text(encoding="utf-8"))
