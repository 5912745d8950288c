from __future__ import annotations

import argparse
import importlib
import math
import time
from pathlib import Path

from . import RESULTS, Options, facts, pages, prepare

TABLES = {
    "rare": ("rare", "RareShapes: how often rare combinations come out right, by method, model and anchor"),
    "guidance": ("guidance", "every guidance method over cfg 1 to 15: accuracy, saturation, distance, diversity, cost"),
    "exact": ("exact", "distance of every method to the true law, in worlds that are known in closed form"),
    "edit": ("edit", "editing by attention: is the edit made, and does the rest stay"),
    "variations": ("variations", "variations of a picture: do they share its look"),
    "sizes": ("sizes", "pictures of another size than the model was trained on"),
    "blocks": ("blocks", "which attention block finds words, and what PAG and SEG do in each"),
    "cost": ("cost", "time of a step of every method against one batched evaluation of the same conds"),
    "memory": ("memory", "memory of editing by attention in networks of full size, by shapes alone"),
    "import": ("import_time", "how long ComfyUI waits for the pack at start-up"),
    "calibrate": ("calibrate", "how well the demo models draw what is common and rare, plain CFG alone"),
}

#: What a table has a use for, beside --quick, --threads and --out.
PAINTED = {"model", "n", "shard", "precision", "minutes", "work", "check"}
READS = dict.fromkeys(TABLES, PAINTED) | {
    "rare": PAINTED | {"split"}, "exact": {"n"}, "cost": {"model", "minutes"}, "memory": set(), "import": set()}


def part(text: str) -> tuple[int, int]:
    """'1/3' -> (1, 3)."""
    i, _, k = text.partition("/")
    if not (i.isdigit() and k.isdigit() and int(i) < int(k)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/K with I from 0 to K - 1, such as 0/2")
    return int(i), int(k)


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py bench", description="Measure one table and print it as Markdown.")
    parser.add_argument("table", nargs="?", default="cost", choices=TABLES, help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="a small run that only shows that everything works")
    parser.add_argument("--model", nargs="+", default=[], help="demo models by name or file (default: all)")
    parser.add_argument("--n", type=int, help="pictures a cell (default: the table's own)")
    parser.add_argument("--split", choices=("dev", "final"), default="dev",
                        help="half of the prompt list: dev for looking (default), final for the published table alone")
    parser.add_argument("--shard", type=part, default=(0, 1), metavar="I/K",
                        help="do part I of K of the work; run again without it to print the table")
    parser.add_argument("--threads", type=int, help="CPU threads of torch; 1 suffers least from busy neighbours")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                        help="of the networks; bf16 paints 1.7 times as fast on a CPU that knows it (default fp32)")
    parser.add_argument("--minutes", type=float,
                        help="paint no longer than this and make the table of what is there; 0: of what was painted")
    parser.add_argument("--work", type=Path, help="folder of what is done already (default: in the user's cache)")
    parser.add_argument("--out", type=Path, help="folder of the results (default bench/results; quick: none)")
    parser.add_argument("--check", action="store_true",
                        help="paint the first batch of every kept row again and drop the rows that have changed")
    said = "; ".join(f"{name}: {what}" for name, (_, what) in TABLES.items())
    parser.epilog = f"dev.py also takes --comfyui PATH, an installation of yours; tables: {said}"
    args = parser.parse_args()
    if args.n is not None and args.n < 1:
        parser.error("--n must be at least 1")
    given = {name for name in PAINTED | {"split"} if getattr(args, name) != parser.get_default(name)}
    if unread := sorted(given - READS[args.table]):
        parser.error(f"the table {args.table} has no use for --{', --'.join(unread)}")
    if args.check and args.shard[1] > 1:
        parser.error("--check: a share of the work does not change what is kept; check first, then share what is left")
    if args.check and args.n and not args.out:
        parser.error("--check looks at the rows of the published table: leave out --n, or name the --out of your own")
    stems = [Path(name).stem for name in args.model]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        parser.error(f"--model: two models are called {', '.join(twice)}; measure them one after the other")
    prepare()
    threads = args.threads or (1 if args.quick else None)
    if threads:
        import torch

        torch.set_num_threads(threads)
    started = time.time()
    until = math.inf if args.minutes is None else time.monotonic() + 60 * args.minutes
    options = Options(args.quick, tuple(args.model), args.n, args.split, args.shard, args.work, args.precision,
                      until, None if args.quick else (args.out or RESULTS) / "kept", args.check)
    table = importlib.import_module(f".{TABLES[args.table][0]}", __package__).main(options)
    table.facts |= facts(started, args.quick)
    print(table.markdown())
    partial = args.model or args.n or args.precision != parser.get_default("precision")
    if args.shard[1] > 1:
        folder = None  # a share is no table
    else:
        folder = args.out or (None if args.quick or partial else RESULTS)
    if partial and not folder and not args.quick:
        print("not saved: --model, --n and --precision make another table than the published one; --out keeps it")
    if folder:
        table.save(folder)
        print(f"saved in {folder}")
    if folder == RESULTS:
        pages.write()


if __name__ == "__main__":
    main()
