"""From images to patch features: the part of PatchCore that fit and predict share, and the rows of a set of images with their origin."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .data import Batch, OnUnreadable, Source, load_batches
from .features import FeatureExtractor
from .images import ImageTransform, list_images
from .threshold import held_out_images


@dataclass(frozen=True)
class ImagePatches:
    """Patch features of one image.

    Attributes:
        name: the image's path, or "image <index>".
        features: [P, D] on the CPU, P = rows * columns of the grid, row-major.
        grid: (rows, columns) of the patch grid.
    """

    name: str
    features: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class GoodPatches:
    """Patch features of the good images of a fit.

    Attributes:
        names: names of the images whose patches are in ``rows``.
        rows: [N, D] on the CPU.
        patch_origins: int32 [N, 3], where each row comes from: index into names, row and column in the patch grid.
        held_out: the images that are kept out of the bank; may be empty.
    """

    names: list[str]
    rows: Tensor
    patch_origins: Tensor
    held_out: list[ImagePatches]


@dataclass(frozen=True)
class PatchBatch:
    """A batch of images of one size with their patch features.

    Attributes:
        paths: one entry an image.
        sizes: (height, width) of each image in its own pixels.
        input_size: (height, width) of what the network saw.
        features: [B, P, D] on the CPU, finite.
        grid: (rows, columns) of the patch grid.
    """

    paths: list[str]
    sizes: list[tuple[int, int]]
    input_size: tuple[int, int]
    features: Tensor
    grid: tuple[int, int]


def resolve_device(device: str | torch.device) -> torch.device:
    """The device to run the backbone on.

    Args:
        device: "auto" (CUDA if there is any, else the CPU), "cpu", "cuda", "cuda:N" or a torch.device.

    Returns:
        The device.

    Raises:
        ValueError: another device, or CUDA where this machine or this torch has none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"PatchCore: expected device to be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}.") from error
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"PatchCore: expected device to be 'auto', 'cpu', 'cuda' or 'cuda:N', got {str(device)!r}.")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"PatchCore: expected device to be on this machine, got {str(device)!r}, but CUDA is not available; use 'cpu' or 'auto'.")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"PatchCore: expected device to be below cuda:{torch.cuda.device_count()}, got {str(device)!r}.")
    return resolved


def resolve_source(source: Source) -> Any:
    """Folders, files and sequences of paths as a list of image paths (with the errors of list_images); everything else as it is."""
    if isinstance(source, str | os.PathLike):
        return list_images(source)
    if isinstance(source, Sequence) and (len(source) == 0 or isinstance(source[0], str | os.PathLike)):
        return list_images(source)
    return source


def extract_batches(
    source: Any,
    extractor: FeatureExtractor,
    transform: ImageTransform,
    *,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    description: str,
    progress: bool | None,
    on_unreadable: OnUnreadable | None = None,
) -> Iterator[PatchBatch]:
    """Batches of patch features, with a progress bar that counts images.

    Args:
        source: what resolve_source gave.
        extractor: on ``device``.
        transform: image to network input.
        device: where the network runs.
        batch_size: images that go through the network at once.
        num_workers: processes that load images.
        description: the name of the bar.
        progress: show the bar; None: if stderr is a terminal.
        on_unreadable: see load_batches.

    Returns:
        An iterator of PatchBatch, in the order of the source.

    Raises:
        ValueError: at once, a bad source; while iterating, an image that cannot be read or whose features are not finite; it is named.
    """
    batches = load_batches(source, transform, batch_size, num_workers, on_unreadable=on_unreadable)  # not in the generator: a bad source is told at once

    def extracted() -> Iterator[PatchBatch]:
        # disable=None: tqdm shows the bar only on a terminal.
        with tqdm(total=_num_images(source), desc=description, unit="image", disable=None if progress is None else not progress) as bar:
            for batch in batches:
                with torch.inference_mode():
                    features, grid = extractor(batch.images.to(device))
                    features = features.to("cpu")  # [B, P, D]
                _check_finite(batch, features)
                yield PatchBatch(batch.paths, batch.sizes, (batch.images.shape[-2], batch.images.shape[-1]), features, grid)
                bar.update(len(batch.paths))

    return extracted()


def gather_good_patches(batches: Iterable[PatchBatch], seed: int) -> GoodPatches:
    """The patch features of all good images, with some images held out (see held_out_images).

    Raises:
        ValueError: there is no image.
    """
    images = [ImagePatches(path, patches, batch.grid) for batch in batches for path, patches in zip(batch.paths, batch.features.unbind(0), strict=True)]
    if not images:
        raise ValueError("PatchCore.fit: expected source to hold at least one image, got none.")
    chosen = set(held_out_images(len(images), seed))
    # A copy each, so that they do not keep their whole batches alive.
    held_out = [replace(image, features=image.features.clone()) for index, image in enumerate(images) if index in chosen]
    kept = [image for index, image in enumerate(images) if index not in chosen]
    images.clear()
    return GoodPatches([image.name for image in kept], patch_origins=_origins(kept), rows=_stack(kept), held_out=held_out)


def _origins(images: Sequence[ImagePatches]) -> Tensor:
    parts = []
    for index, image in enumerate(images):
        rows, columns = torch.meshgrid(*(torch.arange(size, dtype=torch.int32, device="cpu") for size in image.grid), indexing="ij")
        parts.append(torch.stack((torch.full_like(rows, index), rows, columns), dim=-1).flatten(0, 1))  # [P, 3]
    return torch.cat(parts)  # [N, 3]


def _stack(images: list[ImagePatches]) -> Tensor:
    """All patch features as one [N, D] tensor. Empties the list on the way, so that the features are not held twice."""
    first = images[0].features
    rows = torch.empty((sum(image.features.shape[0] for image in images), first.shape[1]), dtype=first.dtype, device="cpu")  # [N, D]
    end = rows.shape[0]
    while images:
        patches = images.pop().features  # [P, D]
        rows[end - patches.shape[0] : end] = patches
        end -= patches.shape[0]
    return rows


def _num_images(source: Any) -> int | None:
    """For the progress bar; None where only iterating tells."""
    images: Any = source.dataset if isinstance(source, DataLoader) else source
    try:
        return len(images)
    except TypeError:
        return None


def _check_finite(batch: Batch, features: Tensor) -> None:
    finite = torch.isfinite(features).flatten(1).all(dim=1)  # [B]
    if not bool(finite.all()):
        path = batch.paths[int((~finite).nonzero()[0])]
        raise ValueError(f"PatchCore: expected patch features to be finite, got NaN or infinity for {path!r}; check that image.")
