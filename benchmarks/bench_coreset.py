"""Coreset selection against what people use: ``python -m benchmarks.bench_coreset [--quick]``.

Every selection runs in a process of its own. Ours is first compared with the canonical loop, pick by pick; a mismatch is reported and not timed. Slow methods
are timed on their first picks and extrapolated, and say so. Peers take turns with ours, so that a slow minute of the machine hits both; read the ratios.

anomalib runs in an environment of its own when ``--peers PYTHON`` names its interpreter (``make bench-peers`` makes one); fpsample where it is installed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .feature_sets import DIM, path_of, real_source
from .harness import CACHE, RESULTS, bar_chart, machine, read_rows, run_worker, summary, write_readme, write_results

WORKER = "benchmarks.coreset_methods"
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8000000000", "MALLOC_TOP_PAD_": "500000000"}
START = 0
# Most picks a method is timed for; its time grows with their number, and the rest is extrapolated.
LIMITS = {"plain_loop": 1000, "torch_difference": 30, "torch_expanded": 100, "anomalib": 40, "anomalib tuned": 40, "fpsample": 100}


def job(method: str, path: Path, picks: int, threads: int, **more: Any) -> dict[str, Any]:
    """Arguments of the worker."""
    return {"method": method.split()[0], "features": str(path), "picks": picks, "threads": threads, "first": START, **more}


def first_difference(path: Path, picks: int) -> int | None:
    """The first pick in which ours differs from the canonical loop, or None; the loop runs for at most 2,000 picks."""
    checked = min(picks, 2000)
    saved = {name: CACHE / f"picks_{name}.npy" for name in ("ours", "one_pass_a_pick")}
    for name, count in (("ours", picks), ("one_pass_a_pick", checked)):
        result = run_worker(sys.executable, WORKER, job(name, path, count, 2, save=str(saved[name])))
        if "error" in result:
            raise SystemExit(f"bench_coreset: {name} failed: {result['error']}")
    a, b = np.load(saved["ours"])[:checked], np.load(saved["one_pass_a_pick"])
    different = np.flatnonzero(a != b)
    return int(different[0]) if len(different) else None


def time_method(method: str, path: Path, picks: int, threads: int, peers: str | None, repeats: int) -> dict[str, Any]:
    """One row of the table; seconds are for all picks."""
    timed = min(picks, LIMITS.get(method, picks))
    python = peers if method.startswith("anomalib") else sys.executable
    if python is None:
        return {"error": "no environment with anomalib; see --peers"}
    environment = {"OMP_NUM_THREADS": str(threads), **(TUNED if method.endswith("tuned") else {})}
    result = run_worker(python, WORKER, job(method, path, timed, threads, repeats=repeats if method == "ours" else 1), environment)
    if "error" in result:
        return result
    seconds = summary(result["seconds"])
    scale = picks / timed
    return {
        "seconds": round(seconds["median"] * scale, 3),
        "iqr": round(seconds["iqr"] * scale, 3),
        "ms_per_pick": round(1000 * seconds["median"] / timed, 4),
        "timed_picks": timed,
        "extra_mb": round(result["extra_mb"], 1),
    }


def bench(name: str, count: int, picks: int, methods: list[tuple[str, int]], peers: str | None, repeats: int) -> list[dict[str, Any]]:
    """All methods on one set."""
    path = path_of(name, count)
    case = {"set": name, "rows": count, "dim": DIM, "picks": picks}
    wrong = first_difference(path, picks)
    if wrong is not None:
        print(f"{name} {count}: ours differs from the loop at pick {wrong}; not timed", file=sys.stderr)
        return [{**case, "method": "ours", "error": f"differs from the canonical loop at pick {wrong}"}]
    rows = []
    for method, threads in methods:
        row = {**case, "method": method, "threads": threads, **time_method(method, path, picks, threads, peers, repeats)}
        rows.append(row)
        print(f"{name:>10} N={count:<8} picks={picks:<6} {method:>16} x{threads}: {row.get('seconds', row.get('error'))}", flush=True)
    return rows


def plan(quick: bool) -> list[tuple[str, int, int, list[tuple[str, int]]]]:
    """(set, rows, picks, methods with their threads)."""
    ours, plain = [("ours", 1), ("ours", 2)], [("plain_loop", 1)]
    if quick:
        return [("real", 20_000, 2_000, [*ours, *plain, ("torch_expanded", 2)]), ("gaussian", 20_000, 2_000, [*ours, *plain])]
    peers = [("torch_expanded", 1), ("torch_expanded", 2), ("torch_difference", 2), ("anomalib", 2), ("anomalib tuned", 2), ("fpsample", 1)]
    cases = [("real", 156_800, 15_680, [*ours, *plain, *peers])]
    cases += [("real", 156_800, picks, [*ours, *plain]) for picks in (1_568, 39_200)]
    cases += [("real", 20_000, 2_000, [*ours, *plain]), ("real", 1_000_000, 10_000, [*ours, *plain])]
    cases += [(name, 156_800, 15_680, [*ours, *plain]) for name in ("gaussian", "clustered", "duplicates")]
    return cases


def merged(new: list[dict[str, Any]], old: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The old rows with those of the new ones' case replaced, in their place; new rows name their own commit."""
    case = (new[0]["set"], new[0]["rows"], new[0]["picks"])
    same = [(row["set"], row["rows"], row["picks"]) == case for row in old]
    place = same.index(True) if any(same) else len(old)
    kept = [row for row, replaced in zip(old, same, strict=True) if not replaced]
    return [*kept[:place], *({**row, "commit": machine()["commit"]} for row in new), *kept[place:]]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: seconds, and how many times longer than ours on one thread."""
    lines = ["| set | rows | picks | method | threads | seconds | x ours (1 thread) | extra MB |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['set']} | {row['rows']:,} | {row['picks']:,} | {row['method']} | {row.get('threads', '')} | {row['error']} | | |")
            continue
        case = (row["set"], row["rows"], row["picks"])
        base = next(r["seconds"] for r in rows if (r["set"], r["rows"], r["picks"], r["method"], r["threads"]) == (*case, "ours", 1))
        note = "" if row["timed_picks"] == row["picks"] else f" (from {row['timed_picks']} picks)"
        lines.append(
            f"| {row['set']} | {row['rows']:,} | {row['picks']:,} | {row['method'].replace('_', ' ')} | {row['threads']} | {row['seconds']:.2f}{note} "
            f"| {row['seconds'] / base:.2f} | {row['extra_mb']:.0f} |"
        )
    return "\n".join(lines)


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """A bar chart on a logarithmic axis, as SVG: seconds of all methods on the first case."""
    case = [row for row in rows if (row["set"], row["rows"], row["picks"]) == (rows[0]["set"], rows[0]["rows"], rows[0]["picks"]) and "seconds" in row]
    bars = [
        (f"{row['method'].replace('_', ' ')}, {row['threads']} thread{'s' if row['threads'] > 1 else ''}", row["seconds"], row["method"] == "ours")
        for row in case
    ]
    bar_chart(path, f"{case[0]['picks']:,} of {case[0]['rows']:,} rows, d = {DIM}: seconds (logarithmic)", bars)


def main() -> None:
    """Runs the plan; without --quick also writes the results, the chart and the table."""
    parser = argparse.ArgumentParser(description="Coreset selection against what people use.")
    parser.add_argument("--quick", action="store_true", help="a minute's worth; writes no files")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter of an environment with anomalib")
    parser.add_argument("--only", type=int, metavar="CASE", help="run this case of the plan alone (0 is the first) and put its rows into the results there are")
    parser.add_argument(
        "--name", default="coreset", help="of the results' files and of the marks in benchmarks/README.md: one for each machine (default: coreset)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="runs of ours; the median counts")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    cases = plan(arguments.quick)
    for name, count, picks, methods in cases if arguments.only is None else [cases[arguments.only]]:
        rows += bench(name, count, picks, methods, arguments.peers, 3 if arguments.quick else arguments.repeats)
    if arguments.only is not None:
        rows = merged(rows, read_rows(arguments.name))
    print(table(rows))
    if not arguments.quick:
        note = f"Real rows: {real_source()}, projected to {DIM} dimensions. Ours includes the rotation and the packing of the int8 copy."
        print(write_results(arguments.name, rows, note))
        chart(rows, RESULTS / f"{arguments.name}.svg")
        write_readme(arguments.name, f"{note}\n\n{table(rows)}\n\n![Seconds by method](results/{arguments.name}.svg)")


if __name__ == "__main__":
    main()
