"""``python -m benchmarks.paper ROOT --dataset NAME``: the rows of the paper's tables and figures on a data set."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

from ..harness import CACHE, ROOT
from . import datasets, exactness, mtd, output
from .backbones import Backbones
from .rows import ROWS, chosen
from .study import Study


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.paper", description="The rows of the paper's tables and figures on a data set.")
    made.add_argument("root", nargs="?", metavar="ROOT", help="folder of the data set")
    made.add_argument("--dataset", choices=sorted(datasets.DATASETS), default="folder", help="its layout and protocol (default: folder, MVTec AD's layout)")
    made.add_argument("--rows", nargs="+", metavar="ROW", help="names of rows or of groups of them (default: all)")
    made.add_argument("--list-rows", action="store_true", help="print the names of all rows with their groups, and end")
    made.add_argument("--backbone", default="wide_resnet50_2", help="network of rows that name none (default: the paper's, wide_resnet50_2)")
    made.add_argument("--weights-dir", type=Path, metavar="DIR", help="folder of state dicts, such as wide_resnet50_2-95faca4d.pth")
    made.add_argument("--download", action="store_true", help="let torchvision fetch weights that are not there")
    made.add_argument("--seeds", type=int, default=5, metavar="N", help="runs of rows that depend on chance: low shot, random rows (default: 5)")
    made.add_argument("--split", choices=mtd.SPLITS, default="tile", help="of the good magnetic tiles; the other rules are rows of their own (default: tile)")
    made.add_argument("--aggregation", choices=("concat", "paper"), default="concat", help="see FeatureExtractor (default: concat)")
    made.add_argument("--limit", type=int, metavar="N", help="at most N nominal images and 2 N of the test of each class: for a try")
    made.add_argument("--out", type=Path, metavar="DIR", help="results, and the cache, safe to delete (default: build/benchmarks/paper/NAME)")
    made.add_argument("--finished", action="store_true", help="run nothing: tables of the rows that are finished in --out")
    made.add_argument("--exactness", action="store_true", help="also compare picks, scores and AUROC between instruction sets, and with greedy in float32")
    made.add_argument("--publish", action="store_true", help="also write the tables and figures into benchmarks/")
    made.add_argument("--quiet", action="store_true", help="no progress bars")
    return made


def run(arguments: argparse.Namespace) -> None:
    """Runs the rows and writes the tables."""
    started = time.perf_counter()
    if arguments.seeds < 1:
        raise ValueError(f"paper: expected --seeds to be at least 1, got {arguments.seeds}.")
    rows = chosen(arguments.rows)
    out = arguments.out or CACHE / "paper" / arguments.dataset
    out.mkdir(parents=True, exist_ok=True)
    dataset = datasets.read(arguments.dataset, arguments.root, split=arguments.split, cache=out / "cache", limit=arguments.limit)
    backbones = Backbones(arguments.weights_dir, arguments.download)
    study = Study(dataset, backbones, arguments.backbone, out, arguments.aggregation, False if arguments.quiet else None, arguments.finished)
    results = study.run(rows, arguments.seeds)
    if all("unavailable" in result for result in results.values()):
        raise ValueError(f"paper: expected at least one row that can run, got none; the first says: {next(iter(results.values()))['unavailable']}")
    exact = exactness.compare(study, out) if arguments.exactness else None
    settings = {"base": study.base, "aggregation": study.aggregation, "seeds": arguments.seeds, "command": command(arguments)}
    report = output.make(dataset, results, exact, {**settings, "seconds": round(time.perf_counter() - started)})
    for path in output.write(report, out):
        print(path)
    if arguments.publish:
        for path in output.publish(report):
            print(path.relative_to(ROOT))


def command(arguments: argparse.Namespace) -> str:
    """The command line without the places of data and weights, which are different elsewhere."""
    parts = ["python", "-m", "benchmarks.paper", "ROOT", "--dataset", arguments.dataset, "--backbone", arguments.backbone, "--seeds", str(arguments.seeds)]
    parts += ["--rows", *arguments.rows] if arguments.rows else []
    for name in ("split", "aggregation", "limit"):
        value = getattr(arguments, name)
        if value not in (None, "tile", "concat"):
            parts += [f"--{name}", str(value)]
    return shlex.join([*parts, *(f"--{name}" for name in ("finished", "exactness", "publish") if getattr(arguments, name))])


def main() -> int:
    """The command."""
    made = parser()
    arguments = made.parse_args()
    if arguments.list_rows:
        for row in ROWS.values():
            print(f"{row.name:28} {row.title:58} {', '.join(row.groups)}")
        return 0
    if arguments.root is None:
        made.error("ROOT is missing: the folder of a data set")
    try:
        run(arguments)
    except KeyboardInterrupt:
        print("paper: interrupted; the same command goes on with what is missing.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
