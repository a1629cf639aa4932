"""AUPRO and pixel AUROC against what people use: ``python -m benchmarks.bench_metrics [--quick] [--peers PYTHON]``.

First all methods measure the same maps; one whose values differ from ours is reported and not timed. Then they take turns, each run in a process of its
own, so that a slow minute of the machine hits all of them; read the ratios. anomalib runs where ``--peers PYTHON`` names an environment that has it
(``make bench-peers`` makes one).
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
from scipy import ndimage

from .harness import CACHE, run_worker, summary, write_results

WORKER = "benchmarks.metric_methods"
SIZE = 256
THREADS = (1, 2)
# anomalib sums in float32.
TOLERANCES = {"aupro": 1e-5, "pixel_auroc": 1e-9}


def make_maps(count: int) -> dict[str, str]:
    """Paths of masks and maps [count, 256, 256], made when they are not there: smooth backgrounds with noise; every other image has one to three defects.

    Defects are ellipses of 3 to 25 pixels in each direction; the map rises there by 0.3 to 1.5 and fades beyond the mask's edge, while the background
    varies by 0.2: some are found at once, some hardly.
    """
    paths = {name: str(CACHE / f"{name}_{count}.npy") for name in ("masks", "maps")}
    if all((CACHE / f"{name}_{count}.npy").exists() for name in paths):
        return paths
    generator = np.random.default_rng(0)
    masks, maps = np.zeros((count, SIZE, SIZE), bool), np.empty((count, SIZE, SIZE), np.float32)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    for index in range(count):
        coarse = generator.standard_normal((SIZE // 8, SIZE // 8), dtype=np.float32)
        smooth = ndimage.gaussian_filter(ndimage.zoom(coarse, 8, order=1), 4.0)  # [256, 256]
        values = 1 + 0.2 * smooth / smooth.std() + 0.01 * generator.standard_normal((SIZE, SIZE), dtype=np.float32)
        for _ in range(generator.integers(1, 4) if index % 2 else 0):
            (row, column), (height, width) = generator.integers(0, SIZE, 2), generator.integers(3, 25, 2)
            distance = ((rows - row) / height) ** 2 + ((columns - column) / width) ** 2
            masks[index] |= distance <= 1
            values += generator.uniform(0.3, 1.5) * np.exp(-0.7 * distance)
        maps[index] = values
    CACHE.mkdir(parents=True, exist_ok=True)
    np.save(paths["masks"], masks)
    np.save(paths["maps"], maps)
    return paths


def measure(method: str, threads: int, paths: dict[str, str], peers: str | None) -> dict[str, Any]:
    """One run of one method."""
    python = peers if method == "anomalib" else sys.executable
    if python is None:
        return {"error": "no environment with anomalib; see --peers"}
    return run_worker(python, WORKER, {"method": method, "threads": threads, **paths}, {"OMP_NUM_THREADS": str(threads)})


def compare(methods: list[str], paths: dict[str, str], peers: str | None) -> dict[str, dict[str, Any]]:
    """The values of each method, or why it is not timed; ours is the first and what the others are compared with."""
    results = {method: measure(method, 2, paths, peers) for method in methods}
    expected = results[methods[0]]
    if "error" in expected:
        raise SystemExit(f"bench_metrics: {methods[0]} failed: {expected['error']}")
    for method, result in results.items():
        for name, value in result.get("values", {}).items():
            difference = abs(value - expected["values"][name])
            if not difference <= TOLERANCES[name]:
                results[method] = {"error": f"{name} differs from ours by {difference:.2g}"}
    return results


def bench(count: int, methods: list[str], repeats: int, peers: str | None) -> list[dict[str, Any]]:
    """One row for each method and number of threads."""
    paths = make_maps(count)
    case = {"maps": count, "size": SIZE}
    compared = compare(methods, paths, peers)
    rows = [{**case, "method": method, "error": result["error"]} for method, result in compared.items() if "error" in result]
    turns = [(method, threads) for method in methods if "error" not in compared[method] for threads in THREADS]
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {turn: [] for turn in turns}
    for repeat in range(repeats):
        for method, threads in turns:
            run = measure(method, threads, paths, peers)
            if "error" in run:
                raise SystemExit(f"bench_metrics: {method} failed: {run['error']}")
            runs[method, threads].append(run)
            print(f"{repeat + 1}/{repeats} {method:>14} x{threads}: {run['seconds']:.2f} s", flush=True)
    for (method, threads), results in runs.items():
        seconds = summary([run["seconds"] for run in results])
        row = {**case, "method": method, "threads": threads, "seconds": round(seconds["median"], 3), "iqr": round(seconds["iqr"], 3)}
        rows.append({**row, "extra_mb": round(max(run["extra_mb"] for run in results), 1), **compared[method]["values"]})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: seconds, and how many times longer than ours on as many threads."""
    lines = ["| maps | method | threads | AUPRO | pixel AUROC | seconds | x ours | extra MB |", "|---|---|---|---|---|---|---|---|"]
    ours = {row["threads"]: row["seconds"] for row in rows if row["method"] == "ours"}
    for row in rows:
        head = f"| {row['maps']} of {row['size']} x {row['size']} | {row['method'].replace('_', ' ')} | {row.get('threads', '')} "
        if "error" in row:
            lines.append(f"{head}| {row['error']} | | | | |")
            continue
        values = " | ".join(f"{row[name]:.8f}" if name in row else "" for name in ("aupro", "pixel_auroc"))
        lines.append(f"{head}| {values} | {row['seconds']:.2f} | {row['seconds'] / ours[row['threads']]:.1f} | {row['extra_mb']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Compares, times and prints the table; without --quick also writes results/metrics.json."""
    parser = argparse.ArgumentParser(description="AUPRO and pixel AUROC against what people use.")
    parser.add_argument("--quick", action="store_true", help="50 maps instead of 500; writes no files")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter of an environment with anomalib")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each method; the median counts")
    arguments = parser.parse_args()
    rows = bench(50 if arguments.quick else 500, ["ours", "ours_16_mib", "anomalib", "scikit_learn"], arguments.repeats, arguments.peers)
    print(table(rows))
    if not arguments.quick:
        note = (
            "Made-up maps, smooth with noise and blobs. Ours gives AUPRO and pixel AUROC in one pass, anomalib and scikit-learn one of them. Other work "
            "shared the machine."
        )
        print(write_results("metrics", rows, note))


if __name__ == "__main__":
    main()
