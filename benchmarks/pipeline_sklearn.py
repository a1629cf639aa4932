"""A scikit-learn pipeline as it is, and with our detector in it: ``python -m benchmarks.pipeline_sklearn [--quick]``.

Novelty detection by the distance to the k-th nearest training row: ``NearestNeighbors(algorithm="brute")`` with a quantile of the leave-one-out distances
against ``KNNDetector``. Scores, offset and decisions are compared first, and a mismatch is reported and not timed; then the two fit and score in turns in one
process. ``run`` does it on rows of the caller's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .feature_sets import CORESET_ROWS, PATCHES, search_paths
from .harness import machine, summary

Rows = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
CONTAMINATION = 0.05


class Stock:
    """Distances to the k-th nearest training row with scikit-learn alone."""

    def __init__(self, k: int) -> None:
        from sklearn.neighbors import NearestNeighbors

        self.index = NearestNeighbors(n_neighbors=k, algorithm="brute")

    def fit(self, rows: Rows) -> Stock:
        """Keeps the rows; the offset is a quantile of their leave-one-out scores."""
        self.index.fit(rows)
        self.offset_ = float(np.percentile(-self.index.kneighbors()[0][:, -1].astype(np.float64), 100 * CONTAMINATION))
        return self

    def score_samples(self, rows: Rows) -> Floats:
        """Minus the distances."""
        scores: Floats = -self.index.kneighbors(rows)[0][:, -1].astype(np.float64)
        return scores


def make_ours(k: int) -> Any:
    """The detector with the same meaning."""
    from patchcore_ext.integrations.sklearn import KNNDetector

    return KNNDetector(k, contamination=CONTAMINATION)


def mismatch(rows: Rows, queries: Rows, k: int) -> str | None:
    """How scores, offset or decisions differ by more than float32 rounding of a distance; None if they do not."""
    stock, ours = Stock(k).fit(rows), make_ours(k).fit(rows)
    theirs, found = stock.score_samples(queries), ours.score_samples(queries)
    slack = 1e-4 * float(np.abs(theirs).max())  # scikit-learn expands |a - b|^2, in float32 with float64 accumulation
    if np.abs(theirs - found).max() > slack or abs(stock.offset_ - ours.offset_) > slack:
        return f"scores differ by {np.abs(theirs - found).max():.3g}, offsets by {abs(stock.offset_ - ours.offset_):.3g}"
    clear = np.abs(theirs - stock.offset_) > slack
    differing = int(((theirs >= stock.offset_) != (ours.predict(queries) == 1))[clear].sum())
    return f"{differing} decisions differ" if differing else None


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the work gives."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def run(rows: Rows, queries: Rows, *, k: int = 5, threads: int = 1, repeats: int = 5) -> list[dict[str, Any]]:
    """Fits and scores with both, in turns.

    Args:
        rows: float32 [M, D], normal samples.
        queries: float32 [Q, D].
        k: Neighbours.
        threads: Of torch, BLAS and OpenMP.
        repeats: Timed rounds, after one round to warm up.

    Returns:
        One row a stage ("fit", "score") and method ("stock", "ours") with median and interquartile range in milliseconds; or one row with "error" where the two
        do not give the same.
    """
    from threadpoolctl import threadpool_limits

    about = {"pipeline": "scikit-learn", "rows": len(rows), "dim": rows.shape[1], "queries": len(queries), "k": k, "threads": threads}
    torch.set_num_threads(threads)
    with threadpool_limits(threads):
        problem = mismatch(rows, queries, k)
        if problem is not None:
            return [{**about, "error": f"{problem}; not timed"}]
        makers: dict[str, Callable[[], Any]] = {"stock": lambda: Stock(k), "ours": lambda: make_ours(k)}
        seconds: dict[tuple[str, str], list[float]] = {(stage, name): [] for stage in ("fit", "score") for name in makers}
        for _ in range(repeats + 1):
            for name, make in makers.items():
                took, fitted = timed(lambda make=make: make().fit(rows))  # type: ignore[misc]
                seconds["fit", name].append(took)
                seconds["score", name].append(timed(lambda fitted=fitted: fitted.score_samples(queries))[0])  # type: ignore[misc]
    result = []
    for (stage, name), values in seconds.items():
        took = summary([1000 * value for value in values[1:]])
        result.append({**about, "stage": stage, "method": name, "ms": round(took["median"], 2), "iqr": round(took["iqr"], 2), "runs": repeats})
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| rows | D | queries | threads | stage | scikit-learn, ms | ours, ms | times |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        head = f"| {row['rows']:,} | {row['dim']} | {row['queries']:,} | {row['threads']} "
        if "error" in row:
            lines.append(f"{head}| {row['error']} | | | |")
        elif row["method"] == "ours":
            same = {field: row[field] for field in ("rows", "dim", "queries", "threads", "stage")}
            stock = next(other["ms"] for other in rows if other.get("method") == "stock" and same.items() <= other.items())
            lines.append(f"{head}| {row['stage']} | {stock:.1f} | {row['ms']:.1f} | {stock / row['ms']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Patch features of good images as rows, all patches of test images as queries."""
    parser = argparse.ArgumentParser(description="scikit-learn's neighbours against KNNDetector.")
    parser.add_argument("--quick", action="store_true", help="fewer rows")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    paths = search_paths("real", 384)
    assert paths["rows"] is not None
    assert paths["picks"] is not None
    assert paths["queries"] is not None
    picks = np.load(paths["picks"])[: CORESET_ROWS // 10 if arguments.quick else CORESET_ROWS]
    rows = np.ascontiguousarray(np.load(paths["rows"], mmap_mode="r")[picks], dtype=np.float32)
    queries = np.ascontiguousarray(np.load(paths["queries"])[: 4 * PATCHES], dtype=np.float32)
    result = [row for threads in (1, 2) for row in run(rows, queries, threads=threads, repeats=arguments.repeats)]
    print(table(result))
    print(json.dumps({"machine": machine(), "rows": result}))


if __name__ == "__main__":
    main()
