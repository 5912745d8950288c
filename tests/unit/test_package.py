"""The pack as a user's ComfyUI and the registry see it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMPORT = """
import importlib.util, sys, time
started = time.perf_counter()
spec = importlib.util.spec_from_file_location("pack", "__init__.py", submodule_search_locations=["."])
module = sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(time.perf_counter() - started, sorted({name.split(".")[0] for name in sys.modules} - sys.stdlib_module_names))
assert callable(module.comfy_entrypoint) and module.WEB_DIRECTORY
"""


@pytest.fixture(scope="module")
def project() -> dict:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def files() -> set[tuple[str, float]]:
    skip = {".git", "out", ".pytest_cache", ".ruff_cache", ".hypothesis"}
    found = (p for top in ROOT.iterdir() if top.name not in skip for p in [top, *top.rglob("*")])
    return {(str(p), p.stat().st_mtime) for p in found if p.is_file()}


def test_importing_the_pack_does_no_work(tmp_path):
    bare = [sys.executable, "-I", "-S", "-B", "-c", IMPORT]  # -S: site-packages are not even there
    before = files()
    said = subprocess.run(bare, cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    seconds, modules = said.stdout.split(" ", 1)
    assert float(seconds) < 0.3
    assert modules.strip() in ("['pack']", "['__main__', 'pack']")
    assert files() == before


def test_pyproject_has_what_the_registry_wants(project):
    assert project["project"]["name"] == "comfyui-rudder"
    assert project["project"]["requires-python"] == ">=3.10"
    assert set(project["project"]["urls"]) == {"Repository", "Documentation", "Bug Tracker"}
    assert {"face", "dev"} <= set(project["project"]["optional-dependencies"])
    comfy = project["tool"]["comfy"]
    assert comfy["PublisherId"] == "rudder" and comfy["DisplayName"] == "Rudder"
    assert comfy["requires-comfyui"] == ">=0.18.2"
    assert "web" not in comfy  # it would serve the help pages under another name than __init__'s WEB_DIRECTORY


def test_pictures_in_pyproject_are_in_the_repository(project):
    for name in ("Icon", "Banner"):
        path = project["tool"]["comfy"][name].split("/main/", 1)[1]
        assert (ROOT / path).is_file(), f"{name}: {path} is missing"


def test_versions_agree(project, dev):
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[(.+?)\]", changelog, re.MULTILINE)[1] == project["project"]["version"]
    assert project["tool"]["comfy"]["requires-comfyui"] == f">={dev.FLOOR}"


def test_run_time_dependencies_are_loose_and_the_same_everywhere(project):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = sorted(line for line in lines if line and not line.startswith("#"))
    assert listed == sorted(project["project"]["dependencies"])
    assert all(re.fullmatch(r"[a-z]+", line) for line in listed)


def test_the_license_is_the_hosts():
    assert "GNU GENERAL PUBLIC LICENSE\n                       Version 3" in (ROOT / "LICENSE").read_text()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the packer uses an old name of pathspec
def test_the_registry_gets_what_users_need_and_no_more(project, tmp_path, monkeypatch):
    packer = pytest.importorskip("comfy_cli.file_utils")
    monkeypatch.chdir(ROOT)
    packer.zip_files(str(tmp_path / "node.zip"), includes=project["tool"]["comfy"]["includes"])
    with zipfile.ZipFile(tmp_path / "node.zip") as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {"__init__.py", "nodes", "guidance", "host", "web", "workflows", "pyproject.toml", "LICENSE"} <= tops
    assert not {"tests", "bench", "dev.py", "locks", ".ci", "out"} & tops
    assert any(name.startswith("demo/models/") and name.endswith(".safetensors") for name in names)
    code = {name for name in names if name.startswith("demo/") and not name.startswith("demo/models/")}
    modules = ("__init__", "judge", "scorer", "words", "world")  # what the node of the judge needs
    assert {name for name in code if not name.endswith(".md")} == {f"demo/{module}.py" for module in modules}


@pytest.mark.parametrize(
    ("version", "says"),
    [("0.30.0", "0.30.0: good"), ("0.18.2", "good"), ("0.3.64", "too old"), (None, "cannot be told from here"),
     ("", "could not")],
)
def test_install_reports_and_never_fails(tmp_path, version, says):
    pack = tmp_path / "custom_nodes" / "comfyui-rudder"
    pack.mkdir(parents=True)
    (pack / "install.py").write_bytes((ROOT / "install.py").read_bytes())
    if version is not None:
        (tmp_path / "comfyui_version.py").write_text(f'__version__ = "{version}"\n' if version else "\xff", "latin-1")
    before = sorted(tmp_path.rglob("*"))
    said = subprocess.run(
        [sys.executable, "-I", "-S", "-B", pack / "install.py"], capture_output=True, text=True, cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "COMFYUI_PATH"},
    )
    assert said.returncode == 0 and says in said.stdout and not said.stderr
    assert sorted(tmp_path.rglob("*")) == before
    if version:
        assert "insightface is not installed" in said.stdout


def test_install_believes_the_manager_where_custom_nodes_lies_elsewhere(tmp_path):
    for folder in ("base/custom_nodes/comfyui-rudder", "ComfyUI"):
        (tmp_path / folder).mkdir(parents=True)
    pack = tmp_path / "base" / "custom_nodes" / "comfyui-rudder" / "install.py"
    pack.write_bytes((ROOT / "install.py").read_bytes())
    (tmp_path / "ComfyUI" / "comfyui_version.py").write_text('__version__ = "0.30.0"\n', "utf-8")
    env = {**os.environ, "COMFYUI_PATH": str(tmp_path / "ComfyUI")}
    said = subprocess.run([sys.executable, "-S", "-B", pack], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert "ComfyUI 0.30.0: good" in said.stdout


def test_the_gallery_knows_every_workflow():
    from rudder.demo import gallery

    assert set(gallery.COLUMNS) == {file.stem for file in (ROOT / "workflows").glob("*.json")}
