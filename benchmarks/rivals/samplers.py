"""Other ways to make a memory bank smaller: rows at random, and learned proxies (Eq. (8), Roth et al. 2022, arXiv:2106.08265)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def random_rows(num_rows: int, count: int, seed: int) -> Tensor:
    """``count`` different rows out of ``num_rows``, each choice as likely as any other, in ascending order."""
    return torch.from_numpy(np.sort(np.random.default_rng(seed).choice(num_rows, count, replace=False)))


def reconstruction_loss(rows: Tensor, proxies: Tensor, sign: int) -> Tensor:
    """Eq. (8): the mean over rows m of ||m - sum_k softmax_k(sign * ||m - p_k||) p_k||^2.

    Args:
        rows: [B, D].
        proxies: [K, D].
        sign: -1: near proxies weigh most; 1: as the equation is printed, where far ones do.
    """
    squared = rows.square().sum(1, keepdim=True) - 2 * rows @ proxies.T + proxies.square().sum(1)
    weights = torch.softmax(sign * squared.clamp(min=1e-12).sqrt(), dim=1)  # [B, K]
    return (rows - weights @ proxies).square().sum(1).mean()


def learned_proxies(rows: Tensor, starts: Tensor, sign: int = -1, *, steps: int = 150, batch_size: int = 256, rate: float = 0.02, seed: int = 0) -> Tensor:
    """Proxies [K, D] that minimise Eq. (8) by Adam, the same bits for any number of threads.

    Args:
        rows: [N, D].
        starts: numbers of the rows that the proxies begin at, [K].
        sign: see reconstruction_loss.
        steps: of the optimiser, each on ``batch_size`` rows drawn with replacement.
        batch_size: rows a step.
        rate: largest step in units of the rows' standard deviation; falls to zero along a half cosine.
        seed: of the draws.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums of matrix products depend on the number
    try:
        sample = rows[starts]
        scale = float(sample.double().std())
        proxies = sample.clone().requires_grad_(True)
        optimiser = torch.optim.Adam([proxies], lr=rate * scale)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        generator = np.random.default_rng(seed)
        for _ in range(steps):
            batch = rows[torch.from_numpy(generator.integers(0, len(rows), batch_size))]
            loss = reconstruction_loss(batch, proxies, sign)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    finally:
        torch.set_num_threads(threads)
    return proxies.detach()
