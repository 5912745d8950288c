"""The real ComfyUI in this process, on the CPU, as nodes meet it: its modules importable, inference mode on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

if "COMFYUI_PATH" not in os.environ:
    raise pytest.UsageError("tests/host needs a ComfyUI tree in COMFYUI_PATH: run `python3 dev.py test tests/host`")

sys.path.insert(0, os.environ["COMFYUI_PATH"])

import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402

dev = sys.modules["dev"]
if dev.numbers(dev.tree_version(Path(os.environ["COMFYUI_PATH"]))) < dev.numbers(dev.MAIN):
    # The proving ground is for contributors and measures on the newest ComfyUI; what it measures is tested on both.
    collect_ignore = ["test_bench.py", "test_bench_edit.py", "test_exact.py"]

args.cpu = True
args.disable_api_nodes = True

from .models import FAMILIES, MODELS  # noqa: E402

torch.set_num_threads(1)  # the models are tiny: threads that wait for one another cost more than they give


@pytest.fixture(autouse=True)
def as_a_node_is_executed(request: pytest.FixtureRequest):
    """execution.py runs nodes in inference mode; mark a test `grad_mode` to leave it. Seeded, so that runs repeat."""
    torch.manual_seed(0)
    with torch.inference_mode(request.node.get_closest_marker("grad_mode") is None):
        yield


@pytest.fixture(scope="module", params=list(MODELS))
def kind(request: pytest.FixtureRequest) -> str:
    """The family of the tiny model: a test that asks for it runs on each."""
    return request.param


@pytest.fixture(scope="module")
def model(kind: str):
    return MODELS[kind]()


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """As `kind`, and SD3."""
    return request.param


@pytest.fixture(scope="module")
def network(family: str):
    return FAMILIES[family]()
