"""SPADE: Cohen and Hoshen 2020, "Sub-Image Anomaly Detection with Deep Pyramid Correspondences", arXiv:2005.02357. The searches are our kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from patchcore_ext import ops


def image_neighbors(train: Tensor, test: Tensor, k: int = 50) -> tuple[Tensor, Tensor]:
    """Image scores and the nearest training images.

    Args:
        train: [N, C], one vector a training image (the mean over the last layer's map).
        test: [T, C].
        k: number of neighbours, reduced to N.

    Returns:
        float32 [T], the mean distance to the k nearest training images, and their numbers, int64 [T, k].
    """
    squared, nearest = ops.nearest_neighbors(test, train, min(k, len(train)))
    return ops.square_root(squared).mean(1).float(), nearest


def pixel_distances(patches: Tensor, nearest: Tensor, gallery: Callable[[Tensor], Tensor]) -> Tensor:
    """Distances [P] of an image's patches [P, D] to the nearest patch, wherever it lies, of the training images that are nearest to the image.

    Args:
        patches: [P, D], the pyramid of layers side by side.
        nearest: [k] numbers of training images.
        gallery: gives the patches [k * P, D] of such images.
    """
    squared, _ = ops.nearest_neighbors(patches, gallery(nearest), 1)
    return ops.square_root(squared)[:, 0].float()


class Gallery:
    """Patches of training images, gathered by image.

    Args:
        rows: [N * P, D], image by image.
        num_patches: P.
    """

    def __init__(self, rows: Tensor, num_patches: int) -> None:
        self._images = rows.view(-1, num_patches, rows.shape[1])  # [N, P, D]

    def __call__(self, images: Tensor) -> Tensor:
        """The patches of these images, [k * P, D]."""
        return torch.index_select(self._images, 0, images).flatten(0, 1)
