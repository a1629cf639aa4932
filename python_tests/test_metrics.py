"""Image metrics against their definitions, brute force."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from patchcore_ext import metrics
from patchcore_ext.patchcore import Prediction


def labelled_scores(seed: int, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes with many ties."""
    generator = np.random.default_rng(seed)
    labels = generator.random(count) < 0.4
    labels[:2] = (True, False)
    return labels, np.round(generator.standard_normal(count) + labels, 1)


def f1_by_definition(labels: np.ndarray, called: np.ndarray) -> float:
    true_positives = int((called & labels).sum())
    return 2 * true_positives / (2 * true_positives + int((called & ~labels).sum()) + int((~called & labels).sum()))


def every_decision(scores: np.ndarray) -> list[np.ndarray]:
    return [scores > threshold for threshold in [-np.inf, *np.unique(scores)]]


@pytest.mark.parametrize("seed", range(10))
def test_image_auroc_is_the_share_of_ordered_pairs(seed: int) -> None:
    labels, scores = labelled_scores(seed)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    assert metrics.image_auroc(labels, scores) == pytest.approx(np.mean(pairs), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_f1_optimal_threshold_is_the_best_of_all_decisions(seed: int) -> None:
    labels, scores = labelled_scores(seed)
    optimum = metrics.f1_optimal_threshold(labels, scores)
    decisions = every_decision(scores)
    best = max(f1_by_definition(labels, called) for called in decisions)
    assert optimum.f1 == best == f1_by_definition(labels, scores > optimum.threshold)
    assert optimum.misclassified == min(int((called != labels).sum()) for called in decisions if f1_by_definition(labels, called) == best)
    assert optimum.misclassified == metrics.misclassified(labels, scores, optimum.threshold)


def test_f1_ties_go_to_the_fewest_misclassified() -> None:
    labels, scores = [1, 0, 0, 1, 1, 1], [6, 5, 4, 3, 2, 1]
    counts = sorted({(f1_by_definition(np.array(labels, bool), called), -int((called != labels).sum())) for called in every_decision(np.array(scores))})
    assert counts[-1] == (0.8, -2)
    assert metrics.f1_optimal_threshold(labels, scores) == metrics.F1Optimum(pytest.approx(1, abs=1e-6), 0.8, 2)
    tied = metrics.f1_optimal_threshold([1, 0, 0, 1], [4, 3, 2, 1])  # F1 is 2/3 with 1 called (1 error) and with all called (2 errors)
    assert tied == metrics.F1Optimum(3.5, 2 / 3, 1)


@pytest.mark.parametrize("seed", range(10))
def test_errors_at_full_recall_are_the_fewest_false_alarms_without_a_miss(seed: int) -> None:
    labels, scores = labelled_scores(seed)
    result = metrics.errors_at_full_recall(labels, scores)
    assert result.false_alarms == min(int((called & ~labels).sum()) for called in every_decision(scores) if called[labels].all())
    assert (scores > result.threshold)[labels].all()
    assert int((scores > result.threshold)[~labels].sum()) == result.false_alarms


@pytest.mark.parametrize("find", [metrics.f1_optimal_threshold, metrics.errors_at_full_recall])
@pytest.mark.parametrize("low", [0.0, 1.0, -1.0, 0.1, 3e38, -3e38, 1e-45])
def test_thresholds_separate_neighbouring_floats_in_float32_too(find: Callable[..., Any], low: float) -> None:
    good = np.float32(low)
    bad = np.nextafter(good, np.float32(np.inf))
    scores = np.array([good, bad])
    threshold = find([0, 1], scores).threshold
    assert (scores > threshold).tolist() == [False, True]  # float32, as NumPy compares a float32 array with a Python float
    assert (scores.astype(np.float64) > threshold).tolist() == [False, True]
    everything = find([1, 1], scores).threshold  # no score lies below
    assert (scores > everything).all()
    assert math.isfinite(everything)


@pytest.mark.parametrize("find", [metrics.f1_optimal_threshold, metrics.errors_at_full_recall])
def test_thresholds_of_scores_beyond_float32(find: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 1e300 <= find([0, 1], [1e300, 2e300]).threshold < 2e300
        assert find([1, 1], [1e300, 2e300]).threshold < 1e300
        assert find([1, 1], [-1e300, 2e300]).threshold < -1e300


def test_misclassified_decides_like_the_model() -> None:
    scores = [0.2, 0.5, 0.5, 0.9]
    verdicts = [Prediction("", score, torch.zeros(1, 1), score > 0.5, 0.5).is_anomalous for score in scores]
    assert metrics.misclassified(verdicts, scores, 0.5) == 0
    assert metrics.misclassified([0, 0, 0, 0], scores, 0.5) == 1
    assert metrics.misclassified([1, 1, 1, 1], scores, 0.5) == 3
    assert metrics.misclassified([1, 1, 0, 0], scores, -math.inf) == 2


@pytest.mark.parametrize("seed", range(10))
def test_curves_hold_what_each_threshold_gives(seed: int) -> None:
    labels, scores = labelled_scores(seed)
    result = metrics.curves(labels, scores)
    assert result.thresholds.tolist() == [*np.unique(scores)[::-1], -np.inf]
    for threshold, fpr, tpr, recall, precision in zip(result.thresholds, result.fpr, result.tpr, result.recall, result.precision, strict=True):
        called = scores > threshold
        assert fpr == called[~labels].mean()
        assert tpr == recall == called[labels].mean()
        assert precision == (labels[called].mean() if called.any() else 1.0)
    assert np.trapezoid(result.tpr, result.fpr) == pytest.approx(metrics.image_auroc(labels, scores), abs=1e-12)
    assert (np.diff(result.recall) * result.precision[1:]).sum() == pytest.approx(result.average_precision, abs=1e-12)


@pytest.mark.parametrize("function", [metrics.image_auroc, metrics.curves, metrics.f1_optimal_threshold, metrics.errors_at_full_recall])
@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1], [0.1, math.nan], "scores to be finite, got NaN or infinity in 1 of 2"),
        ([0, 1], [0.1, math.inf], "scores to be finite"),
        ([0, 1, 1], [0.1, 0.2], r"equally many, \[N\] with N >= 1, got shapes \[3\] and \[2\]"),
        ([], [], "N >= 1"),
        ([[0, 1]], [[0.1, 0.2]], r"shapes \[1, 2\]"),
        ([0, 2], [0.1, 0.2], r"labels to be 0 \(good\) or 1 \(anomalous\), got 2"),
        ([0, math.nan], [0.1, 0.2], "labels to be 0"),
        ([0, 0], [0.1, 0.2], "at least one anomalous image, got 2 good ones"),
    ],
)
def test_wrong_scores_are_refused(function: Callable[..., Any], labels: list[float], scores: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{function.__name__}: expected .*{message}"):
        function(labels, scores)


def test_other_wrong_input_of_image_metrics() -> None:
    for function in (metrics.image_auroc, metrics.curves):
        with pytest.raises(ValueError, match="at least one good image"):
            function([1, 1], [0.1, 0.2])
    with pytest.raises(TypeError, match="image_auroc: expected scores to be numbers, got list"):
        metrics.image_auroc([0, 1], ["a", "b"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="expected labels to be numbers"):
        metrics.image_auroc([[0], [0, 1]], [0.1, 0.2])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="threshold to be a number, got NaN"):
        metrics.misclassified([0, 1], [0.1, 0.2], math.nan)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_taken(dtype: torch.dtype) -> None:
    labels, scores = torch.tensor([0, 1, 0, 1]), torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=dtype, requires_grad=True)
    assert metrics.image_auroc(labels, scores) == 0.75
    assert metrics.image_auroc(labels.bool(), scores) == 0.75
    with warnings.catch_warnings():
        warnings.simplefilter("error" if dtype != torch.float64 else "ignore")
        assert metrics.pixel_auroc(labels.reshape(1, 2, 2), scores.reshape(1, 2, 2)) == 0.75
