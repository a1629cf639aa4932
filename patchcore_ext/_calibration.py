"""From the good images of a fit to the decision threshold: which scores it rests on, and what the model file tells about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ._extraction import GoodPatches
from .memory_bank import MemoryBank
from .scoring import PatchScorer
from .threshold import conformal_threshold, leave_one_out_scores, log_threshold, quadrants


def calibrate(good: GoodPatches, bank: MemoryBank, make_scorer: Callable[[Tensor], PatchScorer], rate: float) -> tuple[float, dict[str, Any]]:
    """The threshold of a fit (see PatchCore.fit for the rule), told in the log as well.

    Args:
        good: the patch features of the fit.
        bank: the memory bank made of them.
        make_scorer: gives the scorer for bank rows [M, D].
        rate: tolerated share of good images above the threshold.

    Returns:
        The threshold, and for the model file: numbers of images and scores, where the scores came from, the names of held-out images, the
        false alarm rate asked for and the one to expect.
    """
    if good.held_out:
        scorer = make_scorer(bank.features)
        scores, rule = [_image_score(scorer, image.features) for image in good.held_out], "held-out images"
    else:
        scores, rule = _left_out_scores(good, bank, make_scorer)
    # No score at all: a single patch that there is nothing to compare with.
    threshold = conformal_threshold(scores or [0.0], rate)
    num_images = len(good.names) + len(good.held_out)
    log_threshold(threshold, rule, num_images)
    return threshold.value, {
        "num_images": num_images,
        "held_out_names": [image.name for image in good.held_out],
        "threshold_from": rule,
        "num_scores": len(scores),
        "false_alarm_rate": rate,
        "expected_false_alarm_rate": threshold.expected_rate,
    }


def _left_out_scores(good: GoodPatches, bank: MemoryBank, make_scorer: Callable[[Tensor], PatchScorer]) -> tuple[list[float], str]:
    """Scores without held-out images: each image against the rows of the others, or parts of the only image against each other."""
    assert bank.image_indices is not None
    assert bank.positions is not None
    if len(good.names) == 1:
        positions = good.patch_origins[:, 1:]
        grid = (int(positions[-1, 0]) + 1, int(positions[-1, 1]) + 1)
        groups, bank_groups = quadrants(positions, grid), quadrants(bank.positions, grid)
        rule = "scores of each quarter of the image against the others"
    else:
        groups, bank_groups = good.patch_origins[:, 0], bank.image_indices
        rule = "leave-one-image-out scores"

    def score(others: Tensor, patches: Tensor) -> float:
        return _image_score(make_scorer(others), patches)

    return leave_one_out_scores(good.rows, groups, bank.features, bank_groups, score), rule


def _image_score(scorer: PatchScorer, patches: Tensor) -> float:
    return float(scorer(patches.unsqueeze(0)).image_scores[0])
