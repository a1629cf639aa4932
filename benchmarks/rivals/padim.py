"""PaDiM: Defard et al. 2021, arXiv:2011.08785: a gaussian for each place of the image, over channels drawn at random; Mahalanobis distances."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

_BLOCK_BYTES = 1 << 29
REGULARISATION = 0.01  # added to the diagonal of each covariance


def drawn_channels(dim: int, count: int, seed: int) -> Tensor:
    """``count`` of ``dim`` channels, in ascending order; all, where there are no more."""
    if count >= dim:
        return torch.arange(dim)
    return torch.from_numpy(np.sort(np.random.default_rng(seed).choice(dim, count, replace=False)))


def distances(
    train: Callable[[], Iterable[Tensor]],
    test: Callable[[], Iterable[Tensor]],
    channels: Tensor,
    regularisation: float = REGULARISATION,
    block_bytes: int = _BLOCK_BYTES,
) -> Tensor:
    """Mahalanobis distances of the test images' patches, float32 [T, P].

    Args:
        train: gives the training images' features [B, P, D], batch by batch; called once for each block of places.
        test: the same for the test images.
        channels: those that are used, [C].
        regularisation: added to the diagonal of the covariance, whose divisor is N - 1 (N = 1: the covariance is 0).
        block_bytes: of the covariances that are held at a time.
    """
    num_patches = next(iter(train())).shape[1]
    places = max(1, block_bytes // (8 * len(channels) ** 2))
    blocks = [_block(train, test, channels, slice(start, start + places), regularisation) for start in range(0, num_patches, places)]
    return torch.cat(blocks, dim=1)


def _block(train: Callable[[], Iterable[Tensor]], test: Callable[[], Iterable[Tensor]], channels: Tensor, places: slice, regularisation: float) -> Tensor:
    def chosen(batches: Iterable[Tensor]) -> Iterable[Tensor]:
        return (batch[:, places][:, :, channels].double().transpose(0, 1) for batch in batches)  # [P', B, C]

    count, total, products, origin = 0, torch.tensor(0.0), torch.tensor(0.0), None
    for batch in chosen(train()):
        # Differences to the first image, so that the sums do not lose digits where a channel varies little around a large mean.
        origin = batch[:, :1].clone() if origin is None else origin  # [P', 1, C]
        shifted = batch - origin
        count += shifted.shape[1]
        total = total + shifted.sum(1)  # [P', C]
        products = products + shifted.transpose(1, 2) @ shifted  # [P', C, C]
    mean = total / count
    covariance = (products - count * mean[:, :, None] * mean[:, None, :]) / max(count - 1, 1)
    covariance.diagonal(dim1=1, dim2=2).add_(regularisation)
    factor = torch.linalg.cholesky(covariance)  # lower, [P', C, C]
    # The distance is the length of factor^-1 times the difference; its inverse, made once, turns many small solutions into products.
    whitening = torch.linalg.solve_triangular(factor, torch.eye(len(channels), dtype=torch.float64), upper=False)  # [P', C, C]
    found = []
    for batch in chosen(test()):
        difference = (batch - origin - mean[:, None]).transpose(1, 2)  # [P', C, B]
        found.append((whitening @ difference).square().sum(1).sqrt().T.float())  # [B, P']
    return torch.cat(found)
