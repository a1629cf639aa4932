"""Images by the batch: from folders, paths, datasets, loaders and tensors to what the network takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .images import ImageTransform, list_images, load_image

__all__ = [
    "Batch",
    "ImageDataset",
    "OnUnreadable",
    "Sample",
    "Source",
    "load_batches",
]

Source: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Dataset[Any] | DataLoader[Any] | Tensor"
"""What `load_batches` reads images from."""

OnUnreadable: TypeAlias = "Callable[[str, ValueError], None]"
"""Is told the path of a file that cannot be read, and why; the file is left out."""


class Sample(NamedTuple):
    """One transformed image.

    Attributes:
        image: Float32 tensor [3, h, w], normalised.
        index: Place in the source, from 0.
        path: Its file, or "image <index>".
        size: (height, width) of the original, in pixels.
    """

    image: Tensor
    index: int  # type: ignore[assignment]  # hides tuple.index
    path: str
    size: tuple[int, int]


class Batch(NamedTuple):
    """Transformed images of one size, in the order of the source.

    Attributes:
        images: Float32 tensor [B, 3, h, w], normalised.
        paths: B names: the file, or "image <index>".
        sizes: B times (height, width) of the original, in pixels.
    """

    images: Tensor
    paths: list[str]
    sizes: list[tuple[int, int]]


class ImageDataset(Dataset[Sample]):
    """Transformed images of a folder, a file or a sequence of files, in the order of `list_images`.

    Args:
        source: See `list_images`.
        transform: Applied to each image.

    Attributes:
        paths: The files.
    """

    def __init__(self, source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], transform: ImageTransform) -> None:
        self.paths = list_images(source)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        """Return image `index`.

        Raises:
            ValueError: The file cannot be read or the crop does not fit; the message names the file.
        """
        path = self.paths[index]
        image = load_image(path)
        try:
            transformed = self.transform(image)
        except ValueError as error:
            raise ValueError(f"{error} The image is {path!r}.") from error
        return Sample(transformed, index, path, (image.height, image.width))


class _Unreadable(NamedTuple):
    """A file that gave no sample."""

    path: str
    error: ValueError


class _GuardedImages(ImageDataset):
    """Hands errors over as values: a DataLoader would bury the sentence in a worker's traceback."""

    def __getitem__(self, index: int) -> Sample | _Unreadable:  # type: ignore[override]
        try:
            return super().__getitem__(index)
        except ValueError as error:
            return _Unreadable(self.paths[index], error)


class _TransformedItems(Dataset[Sample]):
    """A user's dataset, its images transformed."""

    def __init__(self, dataset: Any, transform: ImageTransform) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return _sample_from(self.dataset[index], index, self.transform)


def load_batches(
    source: Source, transform: ImageTransform, batch_size: int = 16, num_workers: int = 0, *, on_unreadable: OnUnreadable | None = None
) -> Iterator[Batch]:
    """Return an iterator over transformed batches; the order is that of the source.

    Args:
        source: A folder, a file, a sequence of files (see `list_images`), a Dataset, a DataLoader, or a tensor [B, 3 or 1, H, W].
            Items of a Dataset are an image or a tuple that starts with one; an image is a PIL image or a tensor [C, H, W], uint8 or
            float in 0..1, not normalised. A DataLoader gives such items collated or as a list, and decides its batches itself.
        transform: Applied to each image. Of an ImageDataset only the paths are used.
        batch_size: Most images in a batch. Images of different transformed sizes never share one.
        num_workers: Processes that read and transform the images of files and Datasets; 0 for this one.
        on_unreadable: Called, in the order of the source, for each file that cannot be read or that the crop does not fit, which is then
            left out; None: such a file ends the iteration with its error. Items of Datasets, loaders and tensors always do that.

    Raises:
        ValueError: At once, a bad source or option; while iterating, an image that cannot be read (the message names the file).
        TypeError: A source or an item of the wrong kind.

    Note:
        Neither the default device nor torch's random state matters or is changed. An ImageFolder's or other Dataset's files are
        unknown here, so its images are called "image <index>".
    """
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"load_batches: expected {name} to be an int of at least {least}, got {value!r}.")
    if isinstance(source, Tensor):
        if source.ndim != 4:
            raise ValueError(f"load_batches: expected a tensor source to be of shape [B, 3, H, W], got {list(source.shape)}.")
        return _tensor_batches(torch.split(source, batch_size), transform)
    if isinstance(source, DataLoader):
        return _batches_from_loader(source, transform, batch_size)
    if isinstance(source, IterableDataset):
        return _group((_sample_from(item, index, transform) for index, item in enumerate(source)), batch_size)
    if isinstance(source, ImageDataset):
        source = source.paths
    if isinstance(source, Dataset) or _holds_images(source):
        return _batches_from_dataset(_TransformedItems(source, transform), batch_size, num_workers, None)
    return _batches_from_dataset(_GuardedImages(source, transform), batch_size, num_workers, on_unreadable)


def _batches_from_dataset(dataset: Dataset[Any], batch_size: int, num_workers: int, on_unreadable: OnUnreadable | None) -> Iterator[Batch]:
    # A generator of its own: the loader would draw its seed from the global random state.
    loader: DataLoader[Any] = DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=_collate, generator=torch.Generator(device="cpu"))
    with torch.device("cpu"):
        batches = iter(loader)
    for group in batches:
        for batch in group:
            if isinstance(batch, Batch):
                yield batch
            elif on_unreadable is None:
                raise batch.error
            else:
                on_unreadable(batch.path, batch.error)


def _collate(samples: list[Sample | _Unreadable]) -> list[Batch | _Unreadable]:
    """Return the samples as batches of one size each, in order. Runs in the worker: few, large tensors travel."""
    parts: list[Batch | _Unreadable] = []
    for _, group in groupby(samples, type):
        run = list(group)
        parts += [sample for sample in run if isinstance(sample, _Unreadable)]
        parts += _group((sample for sample in run if isinstance(sample, Sample)), len(samples))
    return parts


def _group(samples: Iterable[Sample], batch_size: int) -> Iterator[Batch]:
    pending: list[Sample] = []
    for sample in samples:
        if pending and (len(pending) == batch_size or sample.image.shape != pending[0].image.shape):
            yield _stack(pending)
            pending = []
        pending.append(sample)
    if pending:
        yield _stack(pending)


def _stack(samples: list[Sample]) -> Batch:
    images = torch.stack([sample.image for sample in samples])  # [B, 3, h, w]
    return Batch(images, [sample.path for sample in samples], [sample.size for sample in samples])


def _tensor_batches(batches: Iterable[Tensor], transform: ImageTransform, start: int = 0) -> Iterator[Batch]:
    for images in batches:
        names = [f"image {index}" for index in range(start, start + len(images))]
        yield Batch(transform.apply_to_batch(images), names, [(images.shape[2], images.shape[3])] * len(images))
        start += len(images)


def _batches_from_loader(loader: DataLoader[Any], transform: ImageTransform, batch_size: int) -> Iterator[Batch]:
    start = 0
    for collated in loader:
        first = collated[0] if isinstance(collated, (tuple, list)) and collated else collated
        if isinstance(first, Tensor) and first.ndim == 4:
            yield from _tensor_batches([first], transform, start)
            start += len(first)
            continue
        # Without a batch sampler the loader gives single items; a list is what a collate_fn leaves of images of mixed sizes.
        items = [collated] if loader.batch_sampler is None or not isinstance(collated, list) else collated
        yield from _group([_sample_from(item, start + index, transform) for index, item in enumerate(items)], batch_size)
        start += len(items)


def _holds_images(source: object) -> bool:
    return isinstance(source, Sequence) and len(source) > 0 and isinstance(source[0], (Tensor, Image.Image, tuple, list))


def _sample_from(item: Any, index: int, transform: ImageTransform) -> Sample:
    image = item[0] if isinstance(item, (tuple, list)) and item else item
    name = f"image {index}"
    try:
        if isinstance(image, Image.Image):
            return Sample(transform(image), index, name, (image.height, image.width))
        if isinstance(image, Tensor) and image.ndim == 3:
            return Sample(transform.apply_to_batch(image.unsqueeze(0))[0], index, name, (image.shape[1], image.shape[2]))
    except (ValueError, TypeError) as error:
        raise type(error)(f"{error} The image is {name!r} of the dataset.") from error
    got = f"a tensor of shape {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
    raise TypeError(
        f"load_batches: expected item {index} of the dataset to be, or to start with, a PIL image or a tensor [C, H, W], got {got}. "
        "Wrap the dataset in one that returns the image."
    )
