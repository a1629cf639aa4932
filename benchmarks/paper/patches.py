"""Patch features of a list of images, made from kept maps whenever they are asked for: never more than a few images at a time in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from patchcore_ext import _random, ops
from patchcore_ext.features import pool_maps

from .maps import MapStore, digest_of, file_digest

_CHUNK_PATCHES = 16 * 784  # arrays of up to 32 MiB are used again by malloc; larger ones cost a page fault each 4 KiB, every time
PROJECTION_DIM = 128
_KEPT_BYTES = 1 << 30


@dataclass(frozen=True)
class Patches:
    """Patch features, [P, D] an image.

    Attributes:
        store: prepared for these images and layers.
        paths: the images.
        layers: names of the layers.
        patch_size: p of Eq. (1).
        stride: s of Eq. (3).
        aggregation: "concat" or "paper", see FeatureExtractor.
    """

    store: MapStore
    paths: tuple[str, ...]
    layers: tuple[str, ...]
    patch_size: int = 3
    stride: int = 1
    aggregation: str = "concat"

    def key(self) -> str:
        """A name for the rows' content."""
        options = [[self.store.key(layer) for layer in self.layers], self.patch_size, self.stride, self.aggregation]
        return digest_of([options, [file_digest(path) for path in self.paths]])

    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches of an image, the same for all."""
        return self._features(self.paths[:1])[1]

    def chunk_images(self) -> int:
        """Images of a chunk."""
        rows, columns = self.grid()
        return max(1, _CHUNK_PATCHES // (rows * columns))

    def chunks(self) -> Iterator[Tensor]:
        """Features [B, P, D] of all images, a few at a time, in order. Those of the last two lists that were asked for stay in memory if they fit."""
        kept = _kept(self)
        yield from self.made() if kept is None else kept

    def made(self) -> Iterator[Tensor]:
        """The same, made anew."""
        step = self.chunk_images()
        for start in range(0, len(self.paths), step):
            yield self._features(self.paths[start : start + step])[0]

    def rows(self, indices: Tensor | None = None) -> Tensor:
        """The rows with these numbers, image by image and patch by patch, [len(indices), D]; None: all."""
        first = self._features(self.paths[:1])[0]
        num_patches, dim = first.shape[1:]
        if indices is None:
            return self._filled((chunk.flatten(0, 1) for chunk in self.made()), num_patches, dim)
        kept, rows, step = _kept(self), torch.empty((len(indices), dim)), self.chunk_images()
        order = indices.argsort()
        images, counts = torch.unique_consecutive(indices[order] // num_patches, return_counts=True)
        for image, places in zip(images.tolist(), order.split(counts.tolist()), strict=True):
            features = self._features(self.paths[image : image + 1])[0][0] if kept is None else kept[image // step][image % step]
            rows[places] = features[indices[places] % num_patches]
        return rows

    def projected(self, seed: int) -> Tensor:
        """All rows as CoresetSampler projects them before it picks: [N, min(D, 128)], the same bits."""
        num_patches, dim = self._features(self.paths[:1])[0].shape[1:]
        parts = (chunk.flatten(0, 1) for chunk in self.chunks())
        if dim <= PROJECTION_DIM:
            return self._filled(parts, num_patches, dim)
        matrix = torch.from_numpy(_random.sparse_projection_matrix(dim, PROJECTION_DIM, seed))
        return self._filled((ops.random_projection(part, matrix) for part in parts), num_patches, PROJECTION_DIM)

    def means(self) -> Tensor:
        """The mean over all places of the last layer's map, [images, C]."""
        return torch.stack([self.store.load(path, self.layers[-1:])[0].double().mean((1, 2)).float() for path in self.paths])

    def _filled(self, parts: Iterable[Tensor], num_patches: int, dim: int) -> Tensor:
        """Rows [N, dim] of all images, from parts of them one behind the other: no copy of all beside."""
        filled, rows = 0, torch.empty((len(self.paths) * num_patches, dim))
        for part in parts:
            rows[filled : filled + len(part)] = part
            filled += len(part)
        return rows

    def _features(self, paths: Sequence[str]) -> tuple[Tensor, tuple[int, int]]:
        loaded = [self.store.load(path, self.layers) for path in paths]
        maps = [torch.stack(values) for values in zip(*loaded, strict=True)]
        features, grid = pool_maps(maps, self.aggregation, self.patch_size, self.stride, 1024)
        return features, grid


@lru_cache(maxsize=2)
def _kept(patches: Patches) -> list[Tensor] | None:
    """All features, or None where they take too much memory."""
    if patches._features(patches.paths[:1])[0].numel() * 4 * len(patches.paths) > _KEPT_BYTES:
        return None
    return list(patches.made())
