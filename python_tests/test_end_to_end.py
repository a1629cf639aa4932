"""The whole road on real images: PatchCore's scores against a script that uses only the backbone's features and ``reference.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from patchcore_ext import PatchCore, _random, reference
from patchcore_ext.data import load_batches
from patchcore_ext.threshold import held_out_images

RATIO, SEED, PROJECTION_DIM = 0.01, 0, 128


def features_of(model: PatchCore, paths: list[str]) -> Tensor:
    parts = []
    with torch.inference_mode():
        for batch in load_batches(paths, model.transform, 16, 0):
            parts.append(model.extractor(batch.images).features)
    return torch.cat(parts)  # [images, P, D]


def reference_scores(train: Tensor, test: Tensor) -> list[float]:
    """Eq. (4) to (7) in plain float64 torch."""
    rows = train.flatten(0, 1)  # [N, D]
    matrix = torch.from_numpy(_random.sparse_projection_matrix(rows.shape[1], PROJECTION_DIM, SEED))
    projected = reference.random_projection(rows, matrix)
    first = _random.start_index(SEED, rows.shape[0])
    state = torch.full((rows.shape[0],), torch.inf, dtype=torch.float64)
    state = reference.update_min_distances(projected, projected[first, None], state)
    state[first] = -1.0
    picks, _, _ = reference.greedy_coreset(projected, state, max(1, int(RATIO * rows.shape[0])) - 1)
    bank = rows[torch.cat([torch.tensor([first]), picks])]
    scores = []
    for patches in test:
        squared, nearest = reference.nearest_neighbors(patches, bank, 1)
        scores.append(float(reference.image_scores(squared.view(1, -1), nearest.view(1, -1), patches, bank, 9)[0]))
    return scores


def test_scores_on_magnetic_tiles_equal_a_script_of_references(magnetic_tiles: Path, resnet18_weights: Path) -> None:
    train = sorted(str(path) for path in (magnetic_tiles / "train" / "good").iterdir())[:60]
    test = [str(path) for defect in ("good", "crack", "blowhole") for path in sorted((magnetic_tiles / "test" / defect).iterdir())[:4]]
    model = PatchCore(
        "resnet18",
        ("layer2", "layer3"),
        weights=resnet18_weights,
        coreset_ratio=RATIO,
        projection_dim=PROJECTION_DIM,
        resize=(96, 96),
        seed=SEED,
        device="cpu",
    ).fit(train, progress=False)
    scores = [prediction.score for prediction in model.predict(test, progress=False)]

    held_out = set(held_out_images(len(train), SEED))
    kept = [path for index, path in enumerate(train) if index not in held_out]
    assert scores == pytest.approx(reference_scores(features_of(model, kept), features_of(model, test)), rel=1e-5)
    assert min(scores[4:]) > 0
    assert sum(scores[4:]) / 8 > sum(scores[:4]) / 4  # the defects stand out
