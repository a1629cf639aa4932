"""A scikit-learn pipeline as it is, and with our detector in it; part of bench_pipelines.

Novelty detection by the distance to the k-th nearest training row: ``NearestNeighbors(algorithm="brute")`` with a quantile of the leave-one-out distances
against ``KNNDetector``. Scores, offset and decisions are compared first, and a mismatch is reported and not timed; then the two fit and score in turns in one
process, on patch features of images that are ready made.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .feature_sets import PATCHES, search_paths
from .harness import summary

Rows = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
CONTAMINATION = 0.05
K = 5
FIT_IMAGES, TEST_IMAGES = 20, 5


class Stock:
    """Distances to the k-th nearest training row with scikit-learn alone."""

    def __init__(self) -> None:
        from sklearn.neighbors import NearestNeighbors

        self.index = NearestNeighbors(n_neighbors=K, algorithm="brute")

    def fit(self, rows: Rows) -> Stock:
        """Keeps the rows; the offset is a quantile of their leave-one-out scores."""
        self.index.fit(rows)
        self.offset_ = float(np.percentile(-self.index.kneighbors()[0][:, -1].astype(np.float64), 100 * CONTAMINATION))
        return self

    def score_samples(self, rows: Rows) -> Floats:
        """Minus the distances."""
        scores: Floats = -self.index.kneighbors(rows)[0][:, -1].astype(np.float64)
        return scores


def make_ours() -> Any:
    """The detector with the same meaning."""
    from patchcore_ext.integrations.sklearn import KNNDetector

    return KNNDetector(K, contamination=CONTAMINATION)


def compare(rows: Rows, queries: Rows) -> dict[str, Any]:
    """The largest difference of a score relative to the largest score, and an error where scores, offset or decisions differ by more than rounding."""
    stock, ours = Stock().fit(rows), make_ours().fit(rows)
    theirs, found = stock.score_samples(queries), ours.score_samples(queries)
    most = float(np.abs(theirs).max())
    slack = 1e-4 * most  # scikit-learn expands |a - b|^2, in float32 with float64 accumulation
    told: dict[str, Any] = {"difference": float(np.abs(theirs - found).max()) / most}
    if told["difference"] > 1e-4 or abs(stock.offset_ - ours.offset_) > slack:
        return {**told, "error": f"scores differ by {told['difference']:.1e} of the largest, offsets by {abs(stock.offset_ - ours.offset_):.3g}"}
    clear = np.abs(theirs - stock.offset_) > slack
    differing = int(((theirs >= stock.offset_) != (ours.predict(queries) == 1))[clear].sum())
    return {**told, "error": f"{differing} decisions differ"} if differing else told


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the work gives."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def run(threads: int, repeats: int) -> list[dict[str, Any]]:
    """Fits and scores with both, in turns, after one round to warm up.

    Returns:
        One row a kind ("stock", "ours") as bench_pipelines has them, with all time under "search"; one row with "error" where the two do not give the same.
    """
    from threadpoolctl import threadpool_limits

    paths = search_paths("real", 384)
    assert paths["rows"] is not None
    assert paths["queries"] is not None
    rows = np.ascontiguousarray(np.load(paths["rows"], mmap_mode="r")[: FIT_IMAGES * PATCHES], dtype=np.float32)
    queries = np.ascontiguousarray(np.load(paths["queries"])[: TEST_IMAGES * PATCHES], dtype=np.float32)
    about = {"pipeline": "scikit-learn", "ratio": 1.0, "threads": threads, "num_fit": FIT_IMAGES, "num_test": TEST_IMAGES, "bank_rows": len(rows)}
    torch.set_num_threads(threads)
    with threadpool_limits(threads):
        told = compare(rows, queries)
        if "error" in told:
            return [{**about, "kind": "ours", **told}]
        makers: dict[str, Callable[[], Any]] = {"stock": Stock, "ours": make_ours}
        seconds: dict[tuple[str, str], list[float]] = {(kind, step): [] for kind in makers for step in ("fit", "test")}
        for _ in range(repeats + 1):
            for kind, make in makers.items():
                took, fitted = timed(lambda make=make: make().fit(rows))  # type: ignore[misc]
                seconds[kind, "fit"].append(took)
                seconds[kind, "test"].append(timed(lambda fitted=fitted: fitted.score_samples(queries))[0])  # type: ignore[misc]
    result = []
    for kind in makers:
        row: dict[str, Any] = {**about, "kind": kind, "equal_rows": 1.0, **told}
        for step in ("fit", "test"):
            took = summary(seconds[kind, step][1:])
            whole = round(took["median"], 4)
            row[step] = {"seconds": whole, "iqr": round(took["iqr"], 4), "backbone": 0.0, "coreset": 0.0, "search": whole, "map": 0.0}
        result.append(row)
    return result
