"""Pixel metrics of made-up maps by one method, in a process of its own: ``python -m benchmarks.metric_methods JSON`` prints values, seconds and memory.

Runs in the environment of the method's package, so it imports patchcore_ext only for our own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .harness import peak_memory_mb

Masks = npt.NDArray[np.bool_]  # [N, H, W]
Maps = npt.NDArray[np.float32]  # [N, H, W]
Values = dict[str, float]


def _ours(masks: Masks, maps: Maps, memory_bytes: int) -> Values:
    from patchcore_ext.metrics import PixelMetrics

    metrics = PixelMetrics(memory_bytes=memory_bytes)
    for mask, anomaly_map in zip(masks, maps, strict=True):
        metrics.update(mask, anomaly_map)
    result = metrics.compute()
    return {"aupro": result.aupro or 0.0, "pixel_auroc": result.pixel_auroc or 0.0}


def ours(masks: Masks, maps: Maps) -> Values:
    """PixelMetrics as it is by default; both metrics come from one pass."""
    return _ours(masks, maps, 2**28)


def ours_16_mib(masks: Masks, maps: Maps) -> Values:
    """PixelMetrics with little memory: most goes through the temporary file."""
    return _ours(masks, maps, 2**24)


def anomalib(masks: Masks, maps: Maps) -> Values:
    """Anomalib's AUPRO with its default limit of 0.3: all maps as one batch, which costs it least; every distinct value is a threshold there too."""
    from anomalib.metrics.aupro import _AUPRO

    metric = _AUPRO(fpr_limit=0.3)
    metric.update(torch.from_numpy(maps), torch.from_numpy(masks).int())
    return {"aupro": float(metric.compute())}


def scikit_learn(masks: Masks, maps: Maps) -> Values:
    """scikit-learn's roc_auc_score over all pixels."""
    from sklearn.metrics import roc_auc_score

    return {"pixel_auroc": float(roc_auc_score(masks.ravel(), maps.ravel()))}


METHODS: dict[str, Callable[[Masks, Maps], Values]] = {function.__name__: function for function in (ours, ours_16_mib, anomalib, scikit_learn)}


def main() -> None:
    """Loads the maps, warms up on the first few, measures once, and prints JSON."""
    arguments: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(arguments["threads"])
    masks, maps = np.load(arguments["masks"]), np.load(arguments["maps"])
    method = METHODS[arguments["method"]]
    method(masks[:4], maps[:4])
    loaded = peak_memory_mb()
    started = time.perf_counter()
    values = method(masks, maps)
    seconds = time.perf_counter() - started
    peak = peak_memory_mb()
    print(json.dumps({"values": values, "seconds": seconds, "extra_mb": peak - loaded}))


if __name__ == "__main__":
    main()
