"""Whole pipelines, stock against ours: ``python -m benchmarks.bench_pipelines --peers PYTHON [--quick]``.

anomalib's Engine and patchcore-inspection's PatchCore fit and score the same images with their own coreset and search and with ours, after the same seeding,
each run in a process of its own, in turns. First the results are compared: image scores must agree to 1e-4 of the largest, on the same memory bank; a
mismatch is reported and nothing timed. Where float32 rounding led the original to other picks, it scores once more with our bank for the comparison, and the
share of equal rows is told. Rows of other ratios that were measured before stay in the results.

``--peers`` names the interpreter of an environment with anomalib and faiss (``make peers``); patchcore-inspection takes part where PATCHCORE_INSPECTION_SRC
names a checkout. Images and weights: see examples/anomalib_engine.py. scikit-learn's part is in pipeline_sklearn.py.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

from . import pipeline_sklearn
from .harness import CACHE, ROOT, machine, read_rows, run_worker, summary, write_readme, write_results

WORKER = "benchmarks.pipeline_methods"
KINDS = ("stock", "ours")
NAMES = {"stock": "as it is", "ours": "with ours"}
PARTS = ("backbone", "coreset", "search", "map")
TOLERANCE = 1e-4
Row = dict[str, Any]


def run(case: Row, kind: str, peers: str, **more: Any) -> Row:
    """One run of the worker, and where its arrays lie."""
    save = str(CACHE / f"pipeline_{case['pipeline']}_{kind}")
    path = os.pathsep.join([str(ROOT), str(Path(os.environ.get("PATCHCORE_INSPECTION_SRC", "/")) / "src")])
    environment = {"PYTHONPATH": path, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": str(case["threads"]), "PYTHONWARNINGS": "ignore"}
    found = run_worker(peers, WORKER, {**case, "kind": kind, "save": save, **more}, environment)
    return found if "error" in found else {**found, "scores": np.load(f"{save}_scores.npy"), "bank": np.load(f"{save}_bank.npy")}


def equal_rows(a: Any, b: Any) -> float:
    """The share of the rows of ``a`` that ``b`` has, too."""
    known = {row.tobytes() for row in b}
    return float(np.mean([row.tobytes() in known for row in a]))


def compare(case: Row, stock: Row, ours: Row, peers: str) -> Row:
    """Whether both score alike: the share of equal rows, the largest difference of a score relative to the largest score, and what is wrong, if anything."""
    same = stock["bank"].shape == ours["bank"].shape and np.array_equal(stock["bank"], ours["bank"])
    told = {"equal_rows": 1.0 if same else equal_rows(stock["bank"], ours["bank"]), "bank_rows": len(ours["bank"])}
    if stock["bank"].shape != ours["bank"].shape:
        return {**told, "error": f"memory banks of shape {stock['bank'].shape} and {ours['bank'].shape}"}
    if not same:
        bank = str(CACHE / f"pipeline_{case['pipeline']}_common.npy")
        np.save(bank, ours["bank"])
        stock = run({**case, "ratio": min(case["ratio"], 0.01)}, "stock", peers, bank=bank)  # its own coreset is thrown away
        if "error" in stock:
            return {**told, "error": stock["error"]}
    told["difference"] = float(np.abs(stock["scores"] - ours["scores"]).max() / np.abs(stock["scores"]).max())
    return told if told["difference"] <= TOLERANCE else {**told, "error": f"scores differ by {told['difference']:.1e} of the largest on the same memory bank"}


def bench(case: Row, repeats: int, peers: str) -> list[Row]:
    """All kinds of one pipeline: compared, then timed in turns."""
    runs: dict[str, list[Row]] = {kind: [run(case, kind, peers)] for kind in KINDS}
    failed = next((runs[kind][0]["error"] for kind in KINDS if "error" in runs[kind][0]), None)
    told = {"error": failed} if failed else compare(case, runs["stock"][0], runs["ours"][0], peers)
    if "error" in told:
        print(f"{case['pipeline']} {case['ratio']}: {told['error']}; not timed", flush=True)
        return [{**case, "kind": "ours", **told}]
    for _ in range(repeats - 1):
        for kind in KINDS:
            runs[kind].append(run(case, kind, peers))
    return [row_of(case, kind, runs[kind], told) for kind in KINDS]


def row_of(case: Row, kind: str, runs: list[Row], told: Row) -> Row:
    """Medians of the runs of a kind, seconds."""
    row = {**case, "kind": kind, **told}
    for step in ("fit", "test"):
        whole = summary([found[f"{step}_seconds"] for found in runs])
        parts = {part: round(summary([found[f"{step}_parts"].get(part, 0.0) for found in runs])["median"], 4) for part in PARTS}
        row[step] = {"seconds": round(whole["median"], 4), "iqr": round(whole["iqr"], 4), **parts}
        print(f"{case['pipeline']:>9} {case['ratio']:>5} {kind:>6} {step:>5}: {row[step]}", flush=True)
    return row


def merged(new: list[Row], old: list[Row]) -> list[Row]:
    """The new rows, with the commit they were measured at, and the old ones of other ratios, smallest ratio first."""
    measured = {(row["pipeline"], row["ratio"]) for row in new}
    rows = [row for row in old if (row["pipeline"], row["ratio"]) not in measured] + [{**row, "commit": machine()["commit"]} for row in new]
    return sorted(rows, key=lambda row: (row["ratio"], row["pipeline"] != "anomalib"))  # stable: kinds keep their order


def table(rows: list[Row]) -> str:
    """Markdown: fit and inference, whole and the share of each part."""
    lines = ["| pipeline | bank rows | step | images | method | seconds | backbone | coreset | search, Eq. 7 | map | rest | x ours | equal rows |"]
    lines.append("|" + "---|" * 13)
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['pipeline']} | {row.get('bank_rows', '')} | | | not timed: {row['error']} | | | | | | | | |")
            continue
        ours = next(r for r in rows if r["kind"] == "ours" and (r["pipeline"], r["ratio"]) == (row["pipeline"], row["ratio"]))
        for step, images in (("fit", row["num_fit"]), ("test", row["num_test"])):
            whole, parts = row[step]["seconds"], [row[step][part] for part in PARTS]
            shares = " | ".join(f"{100 * seconds / whole:.0f}%" for seconds in [*parts, whole - sum(parts)])
            lines.append(
                f"| {row['pipeline']} | {row['bank_rows']:,} | {step} | {images} | {NAMES[row['kind']]} | {whole:.2f} ± {row[step]['iqr']:.2f} | {shares} "
                f"| {whole / ours[step]['seconds']:.2f} | {100 * row['equal_rows']:.1f}% |"
            )
    return "\n".join(lines)


def main() -> None:
    """Runs all pipelines; without --quick also writes results/pipelines.json and the table."""
    parser = argparse.ArgumentParser(description="Whole pipelines, stock against ours.")
    parser.add_argument("--peers", metavar="PYTHON", required=True, help="interpreter of an environment with anomalib and faiss")
    parser.add_argument("--quick", action="store_true", help="few images, one run; writes no results")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.01, 0.1], help="shares of patches in the memory bank")
    parser.add_argument("--images", type=int, default=200, help="good images to fit on; a quarter as many are tested")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind; the median counts")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.images, arguments.repeats, arguments.ratios = 16, 1, [0.02]
    CACHE.mkdir(parents=True, exist_ok=True)
    pipelines = ["anomalib", *(["amazon"] if os.environ.get("PATCHCORE_INSPECTION_SRC") else [])]
    if "amazon" not in pipelines:
        print("bench_pipelines: PATCHCORE_INSPECTION_SRC names no checkout of patchcore-inspection; anomalib alone is measured")
    rows: list[Row] = []
    for ratio in arguments.ratios:
        for pipeline in pipelines:
            sizes = {"num_fit": arguments.images, "num_test": arguments.images // 4}
            rows += bench({"pipeline": pipeline, "ratio": ratio, "threads": arguments.threads, **sizes}, arguments.repeats, arguments.peers)
    if not arguments.quick:
        rows += pipeline_sklearn.run(arguments.threads, max(5, arguments.repeats))
        rows = merged(rows, read_rows("pipelines"))
    print(table(rows))
    if not arguments.quick:
        source = "magnetic tiles" if os.environ.get("PATCHCORE_EXT_DATA") else "solar cells of elpv-dataset"
        here = machine()
        note = (
            f"{here['processor']}, level {here['cpu_level']}, {here['date']}. ResNet18 layer2 + layer3, {source}, {arguments.threads} threads, batches of 8. "
            "anomalib 2.7: its Engine, from files, 256 px, 1,024 patches an image; its fit also validates on the test images. "
            "amazon: patchcore-inspection at fcaa92f, approximate sampler, from tensors, 224 px, 784 patches an image. "
            "scikit-learn: NearestNeighbors by brute force and a quantile of its leave-one-out scores against KNNDetector, k = 5, on features ready made."
        )
        print(write_results("pipelines", rows, note))
        write_readme("pipelines", f"{note}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
