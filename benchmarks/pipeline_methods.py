"""One pipeline, fitted and used once, in a process of its own: ``python -m benchmarks.pipeline_methods JSON`` prints what it took, in all and in parts.

Runs in the environment of anomalib, or with patchcore-inspection's ``src`` on PYTHONPATH. Whole: everything from image files (anomalib) or image tensors
(patchcore-inspection) to a fitted model, and to the scores and maps of the test images. The parts are timed around the pipeline's own calls; what is left are
loading, transforms and the pipeline's own work. With ``"bank"`` the file's rows become the memory bank after the fit.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Finding = dict[str, Any]  # fit_seconds, test_seconds, parts, and arrays scores, bank


class Parts:
    """Seconds of named parts; a part within a part is counted once, with the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open = False

    def time(self, owner: Any, method: str, name: str, keep: list[Any] | None = None) -> None:
        """Lets every call of ``owner.method`` count for a part, and keeps what it returns."""
        call: Callable[..., Any] = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            if self._open:
                return call(*arguments, **options)
            self._open, started = True, time.perf_counter()
            try:
                result = call(*arguments, **options)
            finally:
                self._open = False
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            if keep is not None:
                keep.append(result)
            return result

        object.__setattr__(owner, method, timed)

    def taken(self) -> dict[str, float]:
        """What was counted since the last call."""
        taken, self.seconds = self.seconds, {}
        return taken


def anomalib(arguments: dict[str, Any]) -> Finding:
    """Anomalib's Engine: fit, then predict."""
    import logging

    from anomalib.engine import Engine
    from anomalib.models import Patchcore as Stock
    from lightning import seed_everything

    from examples import anomalib_engine as example
    from patchcore_ext.integrations.anomalib import Patchcore as Ours

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    parts, scores = Parts(), list[Any]()
    model = example.model_of(Ours if arguments["kind"] == "ours" else Stock, arguments["ratio"])
    inner = model.model
    parts.time(inner.feature_extractor, "forward", "backbone")
    parts.time(inner, "subsample_embedding", "coreset")
    parts.time(inner, "nearest_neighbors", "search")
    parts.time(inner, "compute_anomaly_score", "search", scores)
    parts.time(inner.anomaly_map_generator, "forward", "map")
    with tempfile.TemporaryDirectory() as folder:
        example.lay_out(Path(folder), example.real_images(arguments["num_fit"], arguments["num_test"] // 2))
        data = example.data_of(Path(folder))
        engine = Engine(accelerator="cpu", logger=False, default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False)
        seed_everything(0)
        started = time.perf_counter()
        engine.fit(model, datamodule=data)
        fit_seconds, fit_parts = time.perf_counter() - started, parts.taken()
        bank = inner.memory_bank
        scores.clear()  # of the validation
        if arguments.get("bank"):
            inner.memory_bank = torch.from_numpy(np.load(arguments["bank"]))
        started = time.perf_counter()
        engine.predict(model, datamodule=data, return_predictions=True)
        test_seconds = time.perf_counter() - started
    found = {"fit_seconds": fit_seconds, "test_seconds": test_seconds, "fit_parts": fit_parts, "test_parts": parts.taken()}
    return {**found, "scores": torch.cat(scores).numpy(), "bank": bank.numpy()}


def amazon(arguments: dict[str, Any]) -> Finding:
    """PatchCore of patchcore-inspection: fit, then predict."""
    import patchcore.common
    import patchcore.sampler
    from torch.utils.data import DataLoader

    from examples import patchcore_inspection as example
    from patchcore_ext.integrations import patchcore_inspection as ours

    torch.set_num_threads(arguments["threads"])  # importing theirs sets faiss, and with it torch, to four
    samplers, searches = (ours, ours) if arguments["kind"] == "ours" else (patchcore.sampler, patchcore.common)
    sampler = samplers.ApproximateGreedyCoresetSampler(arguments["ratio"], example.CPU)
    model = example.model_of(sampler, searches.FaissNN(False, arguments["threads"]))
    parts = Parts()
    parts.time(model, "_embed", "backbone")
    parts.time(sampler, "run", "coreset")
    parts.time(model.anomaly_scorer, "fit", "search")
    parts.time(model.anomaly_scorer, "predict", "search")
    parts.time(model.anomaly_segmentor, "convert_to_segmentation", "map")
    fit, test = example.images_to_use(arguments["num_fit"], arguments["num_test"])
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  (the starting points are drawn from the global state)
    started = time.perf_counter()
    model.fit(DataLoader(fit, batch_size=8))
    fit_seconds, fit_parts = time.perf_counter() - started, parts.taken()
    bank = model.anomaly_scorer.detection_features
    if arguments.get("bank"):
        model.anomaly_scorer.fit([np.load(arguments["bank"])])
        parts.taken()
    started = time.perf_counter()
    scores = model.predict(DataLoader(test, batch_size=8))[0]
    found = {"fit_seconds": fit_seconds, "test_seconds": time.perf_counter() - started, "fit_parts": fit_parts, "test_parts": parts.taken()}
    return {**found, "scores": np.array(scores), "bank": bank}


PIPELINES = {"anomalib": anomalib, "amazon": amazon}


def main() -> None:
    """Runs one pipeline; arrays go to the files that ``save`` names."""
    arguments = json.loads(sys.argv[1])
    torch.set_num_threads(arguments["threads"])
    found = PIPELINES[arguments["pipeline"]](arguments)
    for name in ("scores", "bank"):
        np.save(f"{arguments['save']}_{name}.npy", found.pop(name))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
