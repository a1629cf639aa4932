"""The threshold: the right quantile, and false alarms at the rate that was asked for."""

from __future__ import annotations

import logging
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from patchcore_ext.threshold import (
    MIN_HELD_OUT,
    MIN_IMAGES,
    conformal_threshold,
    held_out_images,
    leave_one_out_scores,
    log_threshold,
    quadrants,
)


@pytest.mark.parametrize(
    ("num_scores", "rate", "rank", "expected_rate"),
    [
        (99, 0.01, 99, 0.01),  # the smallest number that can show 1%
        (98, 0.01, 98, 1 / 99),  # too few: the largest score
        (199, 0.01, 198, 0.01),
        (99, 0.29, 71, 0.29),  # 100 * 0.29 is less than 29 in floating point
        (99, 0.07, 93, 0.07),  # 100 * 0.07 is more than 7
        (9, 0.3, 7, 0.3),
        (4, 0.4, 3, 0.4),
        (1, 0.5, 1, 0.5),
        (1, 0.01, 1, 0.5),
        (8, 0.01, 8, 1 / 9),
        (10, 0.999, 1, 10 / 11),
    ],
)
def test_rank_is_the_conformal_one(num_scores: int, rate: float, rank: int, expected_rate: float) -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1.0, num_scores + 1))
    threshold = conformal_threshold(list(scores), rate)
    assert threshold.value == rank
    assert threshold.num_scores == num_scores
    assert threshold.expected_rate == pytest.approx(expected_rate)
    assert threshold.reached == (expected_rate <= rate + 1e-9)


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.05, 0.1, 1 / 3, 0.5, 0.9])
def test_rank_agrees_with_exact_fractions(rate: float) -> None:
    exact_rate = Fraction(rate).limit_denominator(1000)
    for count in range(1, 300):
        rank = min(math.ceil((count + 1) * (1 - exact_rate)), count)
        assert conformal_threshold([float(value) for value in range(1, count + 1)], rate).value == rank


@pytest.mark.parametrize(("num_held_out", "rate"), [(8, 0.01), (20, 0.1), (40, 0.05), (99, 0.01), (150, 0.02)])
def test_share_of_false_alarms_is_the_expected_one(num_held_out: int, rate: float) -> None:
    # Each trial: a threshold from held-out scores, then one more good score. The false alarms of independent trials are binomial.
    trials = 20_000
    random = np.random.default_rng(num_held_out)
    scores = random.gamma(4.0, size=(trials, num_held_out + 1))
    thresholds = [conformal_threshold(row[:-1], rate) for row in scores]
    share = np.mean([row[-1] > threshold.value for row, threshold in zip(scores, thresholds, strict=True)])
    expected = thresholds[0].expected_rate
    error = math.sqrt(expected * (1 - expected) / trials)
    assert abs(share - expected) < 4 * error
    if thresholds[0].reached:
        assert share < rate + 4 * error


def test_ties_give_fewer_alarms_never_more() -> None:
    threshold = conformal_threshold([1.0] * 50 + [2.0] * 49, 0.2)
    assert threshold.value == 2.0
    assert not any(score > threshold.value for score in (1.0, 2.0))


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_rate_outside_its_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="expected false_alarm_rate to be between 0 and 1"):
        conformal_threshold([1.0], rate)


@pytest.mark.parametrize("scores", [[], [1.0, float("nan")], [float("inf")]])
def test_scores_must_be_finite_and_some(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="expected scores to be at least one finite number"):
        conformal_threshold(scores, 0.1)


@pytest.mark.parametrize(("num_images", "count"), [(1, 0), (MIN_IMAGES - 1, 0), (MIN_IMAGES, MIN_HELD_OUT), (80, 8), (89, 8), (90, 9), (209, 20)])
def test_number_of_held_out_images(num_images: int, count: int) -> None:
    chosen = held_out_images(num_images, seed=0)
    assert len(chosen) == count == len(set(chosen))
    assert chosen == sorted(chosen)
    assert all(0 <= index < num_images for index in chosen)


def test_held_out_images_follow_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = held_out_images(100, seed=5)
    torch.manual_seed(2)
    torch.set_default_dtype(torch.float64)
    assert held_out_images(100, seed=5) == first
    assert held_out_images(100, seed=6) != first
    # All images have the same chance: 400 draws of 10 of 100 hold each image 40 times, with a deviation of 6.
    counts = np.bincount([index for seed in range(400) for index in held_out_images(100, seed)], minlength=100)
    assert counts.min() > 40 - 5 * 6
    assert counts.max() < 40 + 5 * 6


def largest_distance(bank: Tensor, patches: Tensor) -> float:
    return float(torch.cdist(patches, bank).amin(dim=1).max())


def test_left_out_scores_never_see_their_own_rows() -> None:
    patches = torch.tensor([[0.0], [1.0], [10.0], [12.0], [30.0]])
    groups = torch.tensor([0, 0, 1, 1, 2])
    scores = leave_one_out_scores(patches, groups, patches, groups, largest_distance)
    assert scores == [10.0, 11.0, 18.0]


def test_group_that_owns_the_bank_has_no_score() -> None:
    patches, groups = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([0, 1, 1])
    assert leave_one_out_scores(patches, groups, patches[:1], groups[:1], largest_distance) == [5.0]
    assert leave_one_out_scores(patches[:1], groups[:1], patches[:1], groups[:1], largest_distance) == []


@pytest.mark.parametrize(
    ("grid", "expected"),
    [((3, 4), [[0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]), ((1, 3), [[2, 3, 3]]), ((1, 1), [[3]]), ((2, 2), [[0, 1], [2, 3]])],
)
def test_quadrants(grid: tuple[int, int], expected: list[list[int]]) -> None:
    positions = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).int()
    assert quadrants(positions, grid).view(grid).tolist() == expected


@pytest.mark.parametrize(
    ("num_scores", "rate", "num_images", "warning"),
    [
        (99, 0.01, 990, None),
        (8, 0.01, 40, "8 held-out images are too few for a false alarm rate of 0.01: .* about 0.11 .* takes 990 good images"),
        (8, 0.1, 40, "takes 90 good images"),
        (7, 0.5, 7, r"With 7 good images \(fewer than 20\) none is held out"),
        (2, 0.5, 1, r"With 1 good image \(fewer than 20\) none is held out"),
    ],
)
def test_log_tells_what_the_threshold_rests_on(caplog: pytest.LogCaptureFixture, num_scores: int, rate: float, num_images: int, warning: str | None) -> None:
    caplog.set_level(logging.INFO, logger="patchcore_ext")
    log_threshold(conformal_threshold([float(value) for value in range(num_scores)], rate), "held-out images", num_images)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"from {num_scores} held-out images" in caplog.records[0].getMessage()
    if warning is None:
        assert warnings == []
    else:
        assert len(warnings) == 1
        assert re.search(warning, warnings[0])
