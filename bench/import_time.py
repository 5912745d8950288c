"""How long ComfyUI waits for the pack at start-up: its root and its nodes, in fresh processes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

from . import ROOT, Options, Table

AIM = 0.3  # seconds
# ComfyUI's own start-up imports torch, comfy and its nodes before any pack; only what comes after is ours.
PROBE = """
import asyncio, importlib.util, json, sys, time
sys.path.insert(0, sys.argv[2])
from comfy.cli_args import args
args.cpu = True
import torch, comfy.samplers, comfy.sd, comfy_api.latest, comfy_execution.utils, folder_paths, nodes
before, started = set(sys.modules), time.perf_counter()
root = sys.argv[1]
spec = importlib.util.spec_from_file_location("rudder", root + "/__init__.py", submodule_search_locations=[root])
pack = sys.modules["rudder"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
imported = time.perf_counter()
found = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
done = time.perf_counter()
new = {name.split(".")[0] for name in set(sys.modules) - before} - {"rudder"}
print(json.dumps({"root": imported - started, "all": done - started, "nodes": len(found), "others": sorted(new)}))
"""


def probe() -> dict:
    """One fresh process, compiled files in place as on any start but the first."""
    tree = os.environ["COMFYUI_PATH"]
    done = subprocess.run([sys.executable, "-c", PROBE, str(ROOT), tree], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the pack cannot be imported:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main(options: Options) -> Table:
    if not options.quick:
        probe()  # compiles what was never imported
    found = [probe() for _ in range(1 if options.quick else 5)]
    rows = []
    for what, key in (("root package", "root"), ("root package and all nodes", "all")):
        times = [run[key] for run in found]
        spread = {"median": statistics.median(times), "low": min(times), "high": max(times)}
        rows.append({"what": what, **spread, "runs": len(times)})
    total = rows[-1]["median"]
    others = ", ".join(found[0]["others"]) or "none"
    return Table(
        "import",
        "Import of the pack, seconds",
        {"what": ("what", ""), "median": ("median", ".4f"), "low": ("lowest", ".4f"), "high": ("highest", ".4f"),
         "runs": ("runs", "d")},
        rows,
        [
            f"Aim: at most {AIM} s beyond ComfyUI and torch; {total:.3f} s: {'met' if total <= AIM else 'NOT MET'}.",
            f"{found[0]['nodes']} nodes. Modules of others that the pack is the first to import: {others}.",
        ],
    )
