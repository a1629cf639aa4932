"""What the integrations share: rows where there are kernels for them."""

from __future__ import annotations

from torch import Tensor

from .. import _library


def where_kernels_are(rows: Tensor) -> Tensor:
    """``rows``, moved to the CPU if their device has no kernels."""
    return rows if _library.kernel_problem(rows.device) is None else rows.cpu()
