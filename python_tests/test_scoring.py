"""PatchScorer and the anomaly map."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from conftest import DTYPES, FEATURE_KINDS, make_features
from numpy_oracle import image_score, nearest
from scipy.ndimage import gaussian_filter
from torch import Tensor

from patchcore_ext import MemoryBank, PatchScorer, reference
from patchcore_ext.scoring import SCORES, anomaly_maps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FEATURE_KINDS)
@pytest.mark.parametrize(("rows", "num_neighbors"), [(40, 9), (5, 9), (1, 9), (40, 1), (40, 40)])
def test_scores_equal_reference_and_numpy(kind: str, dtype: torch.dtype, rows: int, num_neighbors: int) -> None:
    bank = make_features(kind, rows, 21, dtype)
    patches = make_features(kind, 18, 21, dtype, seed=1).view(3, 6, 21)
    scores = PatchScorer(bank, num_neighbors)(patches)

    squared, indices = reference.nearest_neighbors(patches.flatten(0, 1), bank, 1)
    assert torch.equal(scores.patch_distances, reference.square_root(squared).float().view(3, 6))
    assert torch.equal(scores.nearest_indices, indices.view(3, 6))
    expected = reference.image_scores(squared.view(3, 6), indices.view(3, 6), patches.flatten(0, 1), bank, num_neighbors)
    assert torch.equal(scores.image_scores, expected)

    expected_squared, expected_indices = nearest(patches.flatten(0, 1).double().numpy(), bank.double().numpy(), 1)
    assert np.array_equal(scores.nearest_indices.numpy().ravel(), expected_indices.ravel())
    assert np.array_equal(scores.patch_distances.numpy().ravel(), np.sqrt(expected_squared.ravel()).astype(np.float32))
    by_numpy = [image_score(image.double().numpy(), bank.double().numpy(), num_neighbors) for image in patches]
    assert scores.image_scores.tolist() == [float(np.float32(value)) for value in by_numpy]  # NumPy's exp, rounded: the same float32


def test_equation_7_by_hand_on_three_rows() -> None:
    bank = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    patches = torch.tensor([[[0.0, -2.0], [3.0, 0.5]]])  # distances 2 and 0.5 to rows 0 and 1
    # t = (0, -2), m* = (0, 0); N_3 = rows 0, 2, 1 at distances 2, 3, sqrt(13) from t
    e2, e3, e13 = math.exp(2), math.exp(3), math.exp(math.sqrt(13))
    scores = PatchScorer(bank, num_neighbors=3)(patches)
    assert scores.image_scores.item() == pytest.approx((1 - e2 / (e2 + e3 + e13)) * 2, rel=1e-7)
    assert scores.patch_distances.tolist() == [[2.0, 0.5]]
    assert scores.nearest_indices.tolist() == [[0, 1]]
    assert PatchScorer(bank, num_neighbors=2)(patches).image_scores.item() == pytest.approx((1 - e2 / (e2 + e3)) * 2, rel=1e-7)
    assert PatchScorer(bank, num_neighbors=1)(patches).image_scores.item() == 2.0


def test_one_image_alone_gets_the_bits_of_the_batch() -> None:
    scorer = PatchScorer(make_features("random", 700, 30))
    patches = make_features("random", 60, 30, seed=2).view(4, 15, 30)
    batch = scorer(patches)
    for image in range(4):
        for alone in (scorer(patches[image]), scorer(patches[image : image + 1])):
            assert torch.equal(alone.image_scores, batch.image_scores[image, None])
            assert torch.equal(alone.patch_distances[0], batch.patch_distances[image])
            assert torch.equal(alone.nearest_indices[0], batch.nearest_indices[image])


def few_line_score(mode: str, patches: Tensor, bank: Tensor, b: int) -> float:
    """Each peer's formula, independently and in plain torch."""
    distances = torch.cdist(patches.double(), bank.double())
    smallest, rows = distances.min(1)
    patch = smallest.argmax()
    if mode == "amazon":
        return float(smallest.square().max())
    if mode == "max":
        return float(smallest.max())
    support = torch.cdist(bank[rows[patch], None].double(), bank.double()).topk(b, largest=False).indices[0]
    return float((1 - torch.softmax(distances[patch, support], 0)[0]) * smallest[patch])


@pytest.mark.parametrize("mode", ["max", "amazon", "anomalib", "paper"])
def test_score_modes_follow_their_formulas(mode: str) -> None:
    bank, patches = make_features("random", 50, 8), make_features("random", 30, 8, seed=4).view(2, 15, 8)
    scores = PatchScorer(bank, num_neighbors=5, score=mode)(patches)
    for image in range(2):
        assert float(scores.image_scores[image]) == pytest.approx(few_line_score(mode, patches[image], bank, 5), rel=1e-6)
    if mode == "amazon":
        assert torch.allclose(scores.patch_distances, PatchScorer(bank)(patches).patch_distances ** 2)


def test_anomalib_and_paper_part_ways_on_duplicates() -> None:
    """Row 1 is a duplicate of row 2, which anomalib's column 0 then stands for; with m* itself in slot 0 nothing changes as the distances are equal."""
    bank = torch.tensor([[5.0], [0.0], [0.0]])
    patches = torch.tensor([[[-1.0]]])
    paper, anomalib = (PatchScorer(bank, 2, score=mode)(patches).image_scores.item() for mode in ("paper", "anomalib"))
    assert paper == anomalib == 0.5


def test_nearest() -> None:
    bank, queries = make_features("tied", 30, 4), make_features("tied", 6, 4, seed=1)
    scorer = PatchScorer(bank)
    for k in (1, 2, 30):
        distances, indices = scorer.nearest(queries, k)
        squared, expected = reference.nearest_neighbors(queries, bank, k)
        assert torch.equal(distances, reference.square_root(squared).float())
        assert torch.equal(indices, expected)
    with pytest.raises(ValueError, match=r"PatchScorer.nearest: expected k to be between 1 and 30 \(the rows of the bank\), got 31"):
        scorer.nearest(queries, 31)


def test_bank_rows_find_themselves_at_distance_zero_also_with_an_offset() -> None:
    for offset in (0.0, 100.0, 1e4):
        bank = make_features("random", 200, 64) + offset
        scores = PatchScorer(bank)(bank[None])
        assert torch.equal(scores.patch_distances, torch.zeros(1, 200))
        assert scores.nearest_indices[0].tolist() == list(range(200))


def test_memory_banks_and_arrays_are_taken() -> None:
    bank, patches = make_features("random", 20, 6), make_features("random", 4, 6, seed=1)
    expected = PatchScorer(bank)(patches)
    for same in (MemoryBank(bank), bank.numpy()):
        assert torch.equal(PatchScorer(same)(patches.numpy()).image_scores, expected.image_scores)


def test_the_bank_is_a_buffer() -> None:
    scorer = PatchScorer(make_features("random", 20, 6))
    assert list(scorer.state_dict()) == ["bank"]
    other = PatchScorer(make_features("random", 20, 6, seed=9))
    other.load_state_dict(scorer.state_dict())
    patches = make_features("random", 4, 6, seed=1)
    assert torch.equal(other(patches).image_scores, scorer(patches).image_scores)
    assert "bank=[20, 6]" in repr(scorer)


def test_python_threads_share_a_scorer() -> None:
    scorer = PatchScorer(make_features("random", 500, 16))
    batches = [make_features("random", 40, 16, seed=seed) for seed in range(6)]
    expected = [scorer(batch).image_scores for batch in batches]
    found: list[Tensor | None] = [None] * 6

    def work(i: int) -> None:
        found[i] = scorer(batches[i]).image_scores

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if a is not None)
    assert None not in found


def test_wrong_arguments_are_named() -> None:
    bank = make_features("random", 20, 6)
    scorer = PatchScorer(bank)
    with pytest.raises(ValueError, match=r"PatchScorer: expected patches to have the dimension of bank \(6\), got 5; were they extracted"):
        scorer(bank[:, :5])
    with pytest.raises(ValueError, match="expected bank to have at least one row"):
        PatchScorer(bank[:0])
    with pytest.raises(ValueError, match="expected score to be one of 'paper', 'max', 'anomalib', 'amazon', got 'mean'"):
        PatchScorer(bank, score="mean")
    with pytest.raises(ValueError, match="expected num_neighbors to be at least 1, got 0"):
        PatchScorer(bank, 0)
    with pytest.raises(ValueError, match="at least one patch an image"):
        scorer(bank[:0])
    with pytest.raises(ValueError, match="3-dimensional"):
        scorer(bank[None, None])
    bad = bank.clone()
    bad[7, 3] = float("nan")
    with pytest.raises(ValueError, match="PatchScorer: expected bank to be finite, got NaN or infinity in row 7 "):
        PatchScorer(bad)
    for score in SCORES:
        with pytest.raises(ValueError, match="^PatchScorer: expected patches to be finite, got NaN or infinity in row 7 "):
            PatchScorer(bank, score=score)(bad)


def test_anomaly_map_is_bilinear_then_gaussian() -> None:
    distances = torch.rand(3, 6 * 5, generator=torch.Generator().manual_seed(0))
    for size, sigma in (((60, 41), 4.0), ((24, 20), 1.5), ((60, 41), 0.0), ((6, 5), 4.0)):
        found = anomaly_maps(distances, (6, 5), size, sigma)
        up = torch.nn.functional.interpolate(distances.view(3, 1, 6, 5), size=size, mode="bilinear", align_corners=False)[:, 0]
        expected = np.stack([gaussian_filter(image, sigma) if sigma else image for image in up.double().numpy()])
        assert found.shape == (3, *size)
        assert found.dtype == torch.float32
        assert np.abs(found.numpy() - expected).max() < 1e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(anomaly_maps(distances, (6, 5), (60, 41)), anomaly_maps(distances, (6, 5), (60, 41)))
        assert anomaly_maps(distances, (6, 5), (60, 41)).dtype == torch.float32


def test_anomaly_map_refuses_another_grid() -> None:
    with pytest.raises(ValueError, match=r"expected patch_distances to be \[batch, 4 \* 4\] for a grid of \[4, 4\], got float32 of shape \[1, 15\]"):
        anomaly_maps(torch.zeros(1, 15), (4, 4), (8, 8))
