"""Makes this clone importable as the package `rudder`, whatever its folder is called, and dev.py as `dev`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(name: str, file: Path, **options) -> None:
    spec = importlib.util.spec_from_file_location(name, file, **options)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


load("rudder", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
load("dev", ROOT / "dev.py")


@pytest.fixture(scope="session")
def dev():
    return sys.modules["dev"]
