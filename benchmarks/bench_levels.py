"""The search by each instruction set that this processor has: ``python -m benchmarks.bench_levels``.

One process a level (PATCHCORE_EXT_CPU_LEVEL), all on one thread and one image of patches in turns, after another image, as in an inspection. All
answers are compared: the levels must give the same bits. Ratios are medians of those of one turn, which a busy machine changes least.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from .feature_sets import CORESET_ROWS, PATCHES, real_source, search_paths
from .harness import ROOT, summary, write_readme, write_results

Row = dict[str, Any]
MODULE = "benchmarks.bench_levels"
ONE_PERCENT = CORESET_ROWS // 10
REFERENCES = ("avx512", "avx2")  # times are given as shares of that of the first of these that there is


class Case(NamedTuple):
    """What is searched."""

    set: str
    dim: int
    bank_rows: int = CORESET_ROWS
    k: int = 1


CASES = (
    Case("real", 384, ONE_PERCENT),
    *(Case("real", dim) for dim in (384, 512, 1024, 1536)),
    Case("pooled", 656),
    Case("real", 384, k=9),
    Case("gaussian", 384),
)


def serve(arguments: Row) -> None:
    """A worker: for each number read, searches for that image's patches and prints the seconds and a digest of what was found."""
    from patchcore_ext import ops

    torch.set_num_threads(1)
    rows, images = np.load(arguments["rows"], mmap_mode="r"), torch.from_numpy(np.load(arguments["queries"])).split(PATCHES)
    chosen = np.load(arguments["picks"])[: arguments["bank_rows"]] if arguments["picks"] else slice(arguments["bank_rows"])
    bank = torch.from_numpy(np.array(rows[chosen]))
    prepared = ops.prepare_bank(bank)
    for line in sys.stdin:
        asked = int(line)
        ops.nearest_neighbors(images[(asked + 1) % len(images)], bank, arguments["k"], prepared)
        started = time.perf_counter()
        found = ops.nearest_neighbors(images[asked % len(images)], bank, arguments["k"], prepared)
        seconds = time.perf_counter() - started
        digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in found)).hexdigest()
        print(json.dumps({"seconds": seconds, "digest": digest}), flush=True)


@contextmanager
def workers(case: Case, levels: list[str]) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """One worker a level."""
    arguments = json.dumps({**search_paths(case.set, case.dim), "bank_rows": case.bank_rows, "k": case.k})
    started = {}
    try:
        for level in levels:
            environment = {**os.environ, "PATCHCORE_EXT_CPU_LEVEL": level}
            command = [sys.executable, "-m", MODULE, "--worker", arguments]
            started[level] = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        yield started
    finally:
        for process in started.values():
            process.terminate()
            process.communicate()


def answer(process: subprocess.Popen[str], image: int) -> Row:
    """What a worker says of an image."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{image}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"bench_levels: a worker ended with exit status {process.wait()}")
    said: Row = json.loads(line)
    return said


def bench(case: Case, levels: list[str], turns: int) -> list[Row]:
    """One row a level; an error where the levels differ."""
    seconds: dict[str, list[float]] = {level: [] for level in levels}
    with workers(case, levels) as processes:
        for process in processes.values():
            answer(process, 0)  # all of them are ready before the first turn
        for turn in range(turns):
            order = levels[turn % len(levels) :] + levels[: turn % len(levels)]
            said = {level: answer(processes[level], turn) for level in order}
            if len({found["digest"] for found in said.values()}) != 1:
                raise SystemExit(f"bench_levels: {case}: expected the same bits of all levels, image {turn} has others; not timed")
            for level, found in said.items():
                seconds[level].append(found["seconds"])
    reference = next(level for level in (*REFERENCES, *levels) if level in levels)
    rows = []
    for level in levels:
        found = summary([1000 * value for value in seconds[level]])
        share = median(own / other for own, other in zip(seconds[level], seconds[reference], strict=True))
        row = {**case._asdict(), "level": level, "ms": round(found["median"], 2), "iqr": round(found["iqr"], 2), "of": reference, "share": round(share, 3)}
        print(f"{case.set:>8} D={case.dim:<5} M={case.bank_rows:<7} k={case.k} {level:>8}: {row['ms']:.2f} ms, {share:.2f} of {reference}", flush=True)
        rows.append(row)
    return rows


def tables(rows: list[Row]) -> str:
    """Markdown: milliseconds an image by level, and their share of the reference's in the same turn."""
    levels = list(dict.fromkeys(row["level"] for row in rows))
    lines = ["| set | D | bank rows | k | " + " | ".join(levels) + " |", "|---|---|---|---|" + "---|" * len(levels)]
    for case in dict.fromkeys(Case(*(row[field] for field in Case._fields)) for row in rows):
        cells = []
        for level in levels:
            row = next(row for row in rows if row["level"] == level and all(row[field] == getattr(case, field) for field in Case._fields))
            cells.append(f"{row['ms']:.2f} ± {row['iqr']:.2f} ({row['share']:.2f})")
        lines.append(f"| {case.set} | {case.dim} | {case.bank_rows:,} | {case.k} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures all cases, prints the table, and writes results/levels.json and the README's table."""
    from patchcore_ext import build_info

    parser = argparse.ArgumentParser(description="The search by each instruction set that this processor has.")
    parser.add_argument("--turns", type=int, default=64, help="searches of each level (default: 64)")
    parser.add_argument("--scalar", action="store_true", help="the scalar level as well, which takes many times as long; writes no results")
    parser.add_argument("--quick", action="store_true", help="one case, 16 turns; writes no results")
    parser.add_argument("--worker", metavar="JSON", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        serve(json.loads(arguments.worker))
        return
    levels = [level for level in build_info()["cpu_levels"] if level != "scalar" or arguments.scalar] or ["scalar"]
    rows: list[Row] = []
    for case in CASES[:1] if arguments.quick else CASES:
        rows += bench(case, levels, 16 if arguments.quick else arguments.turns)
    print(tables(rows))
    if arguments.quick or arguments.scalar:
        return
    note = (
        f"Real rows: {real_source()}; milliseconds for the {PATCHES} patches of an image on one thread, medians of {arguments.turns} in turns, "
        f"± interquartile range; in brackets the median share of {rows[0]['of']}'s time in the same turn."
    )
    print(write_results("levels", rows, note))
    write_readme("levels", f"{note}\n\n{tables(rows)}")


if __name__ == "__main__":
    main()
