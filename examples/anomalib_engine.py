"""anomalib's Engine fits and tests PatchCore twice on the same images, as it is and with our coreset and search, and compares.

``pip install "patchcore-ext[anomalib]"``, then ``python examples/anomalib_engine.py``. The images are magnetic tiles where PATCHCORE_EXT_DATA
names a folder with mtd/, else the solar cells of the demo (``pip install elpv-dataset``). The backbone is ResNet18 with the weights that
PATCHCORE_EXT_RESNET18 names, a state dict of torchvision; without them it is not trained, which is good for comparing, not for finding defects.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Patchcore as StockPatchcore
from lightning import seed_everything

from patchcore_ext.integrations.anomalib import Patchcore

Split = tuple[list[Path], list[Path], list[Path]]  # good images to fit, good ones to test, defective ones


def spread(paths: list[Path], count: int) -> list[Path]:
    """``count`` of the paths, or as many as there are, evenly from beginning to end."""
    count = min(count, len(paths))
    return [paths[i * len(paths) // count] for i in range(count)]


def real_images(fit: int, test: int) -> Split:
    """So many images to fit on, and so many good and defective ones to test."""
    data = os.environ.get("PATCHCORE_EXT_DATA")
    if data:
        tiles = Path(data) / "mtd"
        defective = sorted(path for path in (tiles / "test").glob("*/*") if path.parent.name != "good")
        parts = (sorted((tiles / "train" / "good").iterdir()), sorted((tiles / "test" / "good").iterdir()), defective)
    else:
        sys.path.insert(0, str(Path(__file__).parent))
        import demo

        good, test_good, bad = demo.pick_cells(demo.package_file("elpv_dataset", "data/labels.csv"))
        parts = ([Path(path) for path in good], [Path(path) for path in test_good], [Path(path) for path in bad])
    return spread(parts[0], fit), spread(parts[1], test), spread(parts[2], test)


def lay_out(folder: Path, split: Split) -> None:
    """Links to the images in the folders that ``data_of`` names."""
    for name, paths in zip(("good", "test_good", "test_bad"), split, strict=True):
        (folder / name).mkdir(parents=True)
        for i, path in enumerate(paths):
            (folder / name / f"{i:04}{path.suffix}").symlink_to(path.resolve())


def data_of(folder: Path) -> Folder:
    """Anomalib's view of the images."""
    return Folder(
        name="images",
        root=folder,
        normal_dir="good",
        normal_test_dir="test_good",
        abnormal_dir="test_bad",
        train_batch_size=8,
        eval_batch_size=8,
        num_workers=0,
        val_split_mode="same_as_test",
    )


def model_of(kind: type[Any], ratio: float) -> Any:
    """A Patchcore with the weights there are; the same random ones for every kind without."""
    seed_everything(0)
    model = kind(backbone="resnet18", pre_trained=False, coreset_sampling_ratio=ratio, visualizer=False)
    weights = os.environ.get("PATCHCORE_EXT_RESNET18")
    if weights:  # timm's ResNet18 has torchvision's names
        missing = model.model.feature_extractor.feature_extractor.load_state_dict(torch.load(weights, weights_only=True), strict=False).missing_keys
        if missing:
            raise ValueError(f"PATCHCORE_EXT_RESNET18: expected a state dict of torchvision's ResNet18, got one without {missing[0]}.")
    return model


def run(kind: type[Any], folder: Path, ratio: float) -> dict[str, Any]:
    """What the Engine finds with a kind of Patchcore, and how long it takes."""
    data, model = data_of(folder), model_of(kind, ratio)
    with tempfile.TemporaryDirectory() as results:
        engine = Engine(accelerator="cpu", logger=False, default_root_dir=results, enable_progress_bar=False, enable_model_summary=False)
        seed_everything(0)
        started = time.perf_counter()
        engine.fit(model, datamodule=data)
        fitted = time.perf_counter()
        (metrics,) = engine.test(model, datamodule=data, verbose=False)
        tested = time.perf_counter()
        batches = engine.predict(model, datamodule=data, return_predictions=True) or []
    scores = torch.cat([batch.pred_score for batch in batches])
    return {"fit_seconds": fitted - started, "test_seconds": tested - fitted, "metrics": metrics, "scores": scores, "bank": model.model.memory_bank}


def main() -> None:
    """Runs both and prints what they found."""
    parser = argparse.ArgumentParser(description="anomalib's Engine with its own and with our coreset and search.")
    parser.add_argument("--images", type=int, default=40, help="good images to fit on; half as many good and defective ones are tested")
    parser.add_argument("--ratio", type=float, default=0.05, help="share of patches in the memory bank")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder), real_images(arguments.images, arguments.images // 2))
        stock, ours = run(StockPatchcore, Path(folder), arguments.ratio), run(Patchcore, Path(folder), arguments.ratio)
    for name, result in (("anomalib", stock), ("patchcore_ext", ours)):
        print(f"{name:>14}: fit {result['fit_seconds']:.2f} s, test {result['test_seconds']:.2f} s, {result['metrics']}")
    same = torch.equal(stock["bank"], ours["bank"])
    print(f"memory banks of {len(ours['bank']):,} rows: {'the same' if same else 'not the same, which near ties can do'}")
    print(f"largest difference of a score in 0..1: {float((stock['scores'] - ours['scores']).abs().max()):.1e}")


if __name__ == "__main__":
    main()
