"""What the ops give, without computing it: shapes and dtypes for torch.compile and torch.export, and what their gradients are (an error)."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from . import _library


def _first_nonfinite_row(features: Tensor) -> Tensor:
    return features.new_empty((), dtype=torch.int64)


def _square_root(values: Tensor) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _random_projection(features: Tensor, matrix: Tensor) -> Tensor:
    return features.new_empty((features.shape[0], matrix.shape[0]), dtype=torch.float32)


def _update_min_distances(features: Tensor, centers: Tensor, min_distances: Tensor) -> None:
    return None


def _codes_bytes(rows: int, words: int) -> int:
    """codes_bytes of csrc/core/cpu/codes.h: codes, norms and residuals, each padded to 64 bytes; opcheck compares it with the kernel's."""
    return sum((count + 63) // 64 * 64 for count in (rows * 4 * words, rows * 4, rows * 4))


def _cuda_codes_bytes(rows: int, depth: int) -> int:
    """code_rows_at of csrc/core/cuda/codes.cuh: codes, norms, starts, residuals and those of tiles, each padded to 256 bytes."""
    padded = max(1, (rows + 127) // 128) * 128
    return sum((size + 255) // 256 * 256 for size in (padded * depth, padded * 4, padded * 8, padded * 4, padded // 128 * 4))


def _cuda_bank_bytes(rows: int, dim: int, with_prefixes: bool) -> int:
    """prepared_bank_bytes of csrc/core/cuda/bank.cu: order, scales, center, codes, and with prefixes the matrix and their codes."""
    depth = (dim + 63) // 64 * 64
    size = (rows * 4 + 255) // 256 * 256 + 256 + (dim * 8 + 255) // 256 * 256 + _cuda_codes_bytes(rows, depth)
    return size + 256 * 2 * depth + _cuda_codes_bytes(rows, 64) + _cuda_codes_bytes(rows, 192) if with_prefixes else size


def _coreset_codes(features: Tensor, center: Tensor, prefix: Tensor) -> Tensor:
    rows, dim = features.shape
    if _library.runs_cuda_kernels(features.device):
        return features.new_empty((256 + _cuda_codes_bytes(rows, (dim + 63) // 64 * 64),), dtype=torch.uint8)
    outputs = prefix.shape[1]
    size = 64 + _codes_bytes(rows, (dim + 3) // 4) + (_codes_bytes(rows, (outputs + 4) // 4) if outputs > 0 else 0)
    return features.new_empty((size,), dtype=torch.uint8)


def _greedy_coreset(features: Tensor, min_distances: Tensor, count: int, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return features.new_empty((count,), dtype=torch.int64), features.new_empty((count,), dtype=torch.float64)


def _greedy_coreset_lazily(features: Tensor, min_distances: Tensor, lowered: Tensor, picks: Tensor, count: int, codes: Tensor) -> tuple[Tensor, Tensor]:
    return features.new_empty((count,), dtype=torch.int64), features.new_empty((count,), dtype=torch.float64)


def _add_picks(features: Tensor, picks: Tensor, min_distances: Tensor, codes: Tensor) -> None:
    return None


def _prepare_bank(bank: Tensor, center: Tensor, matrix: Tensor, short_outputs: int, order: Tensor) -> Tensor:
    """The size of what lay_out of csrc/core/cpu/bank_layout.cpp lays out; opcheck compares it with the kernel's."""
    rows, dim = bank.shape
    if _library.runs_cuda_kernels(bank.device):
        return bank.new_empty((_cuda_bank_bytes(rows, dim, matrix.shape[0] > 0),), dtype=torch.uint8)
    outputs, tiles, stages = matrix.shape[0], (rows + 63) // 64, _library.stage_codes(rows)

    def tile_filter(words: int, start_bytes: int = 256) -> list[int]:
        return [tiles * words * 256, tiles * start_bytes, tiles * 8]

    pieces = [248, 8 * dim, 256 * tiles, *tile_filter((dim + 3) // 4)]
    if outputs > 0:
        words = (short_outputs + 4) // 4
        start_bytes = 64 * _library.stage_bytes() * (1 + sum(end < 4 * words for end in stages)) if stages else 256
        pieces += [(outputs + 63) // 64 * 128 * ((dim + 1) // 2 * 2), *tile_filter(words, start_bytes), 4 * rows]
        coarse = min([short_outputs, *stages[:1]])
        words = (dim + 3) // 4 if outputs == short_outputs else (coarse + 15) // 16 * 4 + (outputs - coarse + 4) // 4
        pieces += [64 * tiles * 4 * words, 256 * tiles, 256 * tiles]
    return bank.new_empty((sum((size + 63) // 64 * 64 for size in pieces),), dtype=torch.uint8)


def _nearest_neighbors(queries: Tensor, bank: Tensor, k: int, prepared: Tensor | None = None) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float64), queries.new_empty(shape, dtype=torch.int64)


def _image_scores(
    squared_distances: Tensor, nearest_indices: Tensor, queries: Tensor, bank: Tensor, num_neighbors: int, prepared: Tensor | None = None
) -> Tensor:
    return queries.new_empty((squared_distances.shape[0],), dtype=torch.float32)


def _score_patches(queries: Tensor, bank: Tensor, num_patches: int, num_neighbors: int, prepared: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    shape = (queries.shape[0] // num_patches, num_patches)
    return queries.new_empty(shape[:1], dtype=torch.float32), queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


_FAKES = (
    _first_nonfinite_row,
    _square_root,
    _random_projection,
    _update_min_distances,
    _coreset_codes,
    _greedy_coreset,
    _greedy_coreset_lazily,
    _add_picks,
    _prepare_bank,
    _nearest_neighbors,
    _image_scores,
    _score_patches,
)
for _fake in _FAKES:
    torch.library.register_fake(f"patchcore_ext::{_fake.__name__[1:]}", _fake)


def _refuse_gradient(op: str) -> None:
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise NotImplementedError(f"{op}: gradients are not implemented; detach its inputs, or use patchcore_ext.reference.{op}, which is differentiable.")

    torch.library.register_autograd(f"patchcore_ext::{op}", backward)


for _op in ("square_root", "random_projection", "nearest_neighbors", "image_scores", "score_patches"):
    _refuse_gradient(_op)
