from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

from . import RESULTS, facts, prepare

TABLES = {
    "cost": ("cost", "time of a step of every method against one batched evaluation of the same conds"),
    "import": ("import_time", "how long ComfyUI waits for the pack at start-up"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure one table and print it as Markdown.")
    parser.add_argument("table", nargs="?", default="cost", choices=TABLES, help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="a small run that only shows that everything works")
    parser.add_argument("--threads", type=int, help="CPU threads of torch; 1 suffers least from busy neighbours")
    parser.add_argument("--out", type=Path, help="folder for TABLE.md and .json (default bench/results; quick: none)")
    parser.epilog = "tables: " + "; ".join(f"{name}: {what}" for name, (_, what) in TABLES.items())
    args = parser.parse_args()
    prepare()
    threads = args.threads or (1 if args.quick else None)
    if threads:
        import torch

        torch.set_num_threads(threads)
    started = time.time()
    table = importlib.import_module(f".{TABLES[args.table][0]}", __package__).main(args.quick)
    table.facts |= facts(started, args.quick)
    print(table.markdown())
    folder = args.out or (None if args.quick else RESULTS)
    if folder:
        table.save(folder)
        print(f"saved in {folder}")


if __name__ == "__main__":
    main()
