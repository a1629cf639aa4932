"""PatchCore of amazon-science/patchcore-inspection with our sampler and our search, beside itself as it is.

Put that project's ``src`` on PYTHONPATH (it is not on PyPI; it needs faiss-cpu, timm, scipy and tqdm), then ``python examples/patchcore_inspection.py``. Images
and weights are found as in anomalib_engine.py: PATCHCORE_EXT_DATA or the demo's solar cells, PATCHCORE_EXT_RESNET18 or random weights.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import patchcore.common
import patchcore.patchcore
import patchcore.sampler
import torch
from torch.utils.data import DataLoader
from torchvision.models import resnet18

from patchcore_ext.data import load_batches
from patchcore_ext.images import ImageTransform, list_images
from patchcore_ext.integrations import patchcore_inspection as ours

SIZE = 224
CPU = torch.device("cpu")


def images_to_use(num_fit: int, num_test: int) -> tuple[torch.Tensor, torch.Tensor]:
    """So many good images to fit on and defective ones to test, ``[count, 3, 224, 224]`` each."""
    data = os.environ.get("PATCHCORE_EXT_DATA")
    if data:
        good, bad = list_images(Path(data) / "mtd" / "train" / "good"), list_images(Path(data) / "mtd" / "test" / "crack")
    else:
        sys.path.insert(0, str(Path(__file__).parent))
        import demo

        good, _, bad = demo.pick_cells(demo.package_file("elpv_dataset", "data/labels.csv"))
    transform = ImageTransform(resize=(SIZE, SIZE))
    fit, test = (torch.cat([batch.images for batch in load_batches(paths, transform, 8, 0)]) for paths in (good[:num_fit], bad[:num_test]))
    return fit, test


def model_of(sampler: Any, search: Any) -> Any:
    """Their PatchCore with a sampler and a search."""
    torch.manual_seed(0)
    network = resnet18(weights=None)
    weights = os.environ.get("PATCHCORE_EXT_RESNET18")
    if weights:
        network.load_state_dict(torch.load(weights, weights_only=True), strict=False)  # what lies behind layer3 is not used
    network.name, network.seed = "resnet18", 0
    model = patchcore.patchcore.PatchCore(CPU)
    model.load(
        backbone=network,
        layers_to_extract_from=["layer2", "layer3"],
        device=CPU,
        input_shape=[3, SIZE, SIZE],
        pretrain_embed_dimension=384,
        target_embed_dimension=384,
        anomaly_score_num_nn=1,
        featuresampler=sampler,
        nn_method=search,
    )
    return model


def run(kinds: Any, search: Any, percentage: float, fit: torch.Tensor, test: torch.Tensor) -> dict[str, Any]:
    """Scores and maps with the samplers of a module and a search, and how long it takes; after the same seeding, whatever they are."""
    model = model_of(kinds.ApproximateGreedyCoresetSampler(percentage, CPU), search)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  (the starting points are drawn from the global state)
    started = time.perf_counter()
    model.fit(DataLoader(fit, batch_size=8))
    fitted = time.perf_counter()
    scores, masks, _, _ = model.predict(DataLoader(test, batch_size=8))
    tested = time.perf_counter()
    bank = model.anomaly_scorer.detection_features
    return {"fit_seconds": fitted - started, "test_seconds": tested - fitted, "scores": np.array(scores), "maps": np.stack(masks), "bank": bank}


def main() -> None:
    """Runs both and prints what they found."""
    parser = argparse.ArgumentParser(description="patchcore-inspection with its own and with our sampler and search.")
    parser.add_argument("--images", type=int, default=16, help="good images to fit on, and defective ones to test")
    parser.add_argument("--percentage", type=float, default=0.1, help="share of patches in the memory bank")
    arguments = parser.parse_args()
    fit, test = images_to_use(arguments.images, arguments.images)
    stock = run(patchcore.sampler, patchcore.common.FaissNN(False, torch.get_num_threads()), arguments.percentage, fit, test)
    mine = run(ours, ours.FaissNN(False, torch.get_num_threads()), arguments.percentage, fit, test)
    for name, result in (("stock", stock), ("patchcore_ext", mine)):
        print(f"{name:>14}: fit {result['fit_seconds']:.2f} s, test {result['test_seconds']:.2f} s")
    same = np.array_equal(stock["bank"], mine["bank"])
    print(f"memory banks of {len(mine['bank']):,} rows: {'the same' if same else 'not the same, which near ties can do'}")
    print(f"largest difference of a score: {np.abs(stock['scores'] - mine['scores']).max():.1e} of {stock['scores'].max():.1f}")


if __name__ == "__main__":
    main()
