"""Where the images of a dataset lie: MVTec AD's layout, one class or many, and what is missing in it.

A class is a folder with ``train/good/``, ``test/<defect>/``, ``test/good/`` and ``ground_truth/<defect>/``; a dataset is one such folder, or
a folder of them (Bergmann et al. 2019, "MVTec AD").
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .images import find_images, list_images, load_image, natural_key

__all__ = ["DatasetClass", "LabelledImage", "load_mask", "read_dataset", "training_folder"]

_GOOD = "good"
_MASK_SUFFIXES = ("_mask.png", ".png")


def training_folder(folder: str) -> str:
    """``folder/train/good`` where there is one, else ``folder``: whoever fits on a class of a dataset does not mean its defects and masks."""
    good = os.path.join(folder, "train", _GOOD)
    return good if os.path.isdir(good) else folder


@dataclass(frozen=True)
class LabelledImage:
    """One test image.

    Attributes:
        path: its file.
        defect: the folder below ``test/`` that it lies in, "good" for good ones.
        mask: file of its ground truth; None for good images and where there is none.
    """

    path: str
    defect: str
    mask: str | None

    @property
    def is_defective(self) -> bool:
        """Whether the image shows a defect."""
        return self.defect != _GOOD


@dataclass(frozen=True)
class DatasetClass:
    """The images of one class (MVTec's "object" or "texture").

    Attributes:
        name: the folder's name.
        train: files of good images to fit on, may be empty.
        test: the test images, by defect, may be empty.
        problems: a sentence for each thing that is missing.
    """

    name: str
    train: tuple[str, ...]
    test: tuple[LabelledImage, ...]
    problems: tuple[str, ...]


def read_dataset(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[DatasetClass]:
    """The classes of a dataset. Only names are read, no image is opened.

    Args:
        source: the folder of one class (it has ``train/`` or ``test/``), a folder of such folders (the others in it are left alone), or
            images without labels: a folder of another kind, a file or a sequence of files, which become the ``train`` of a single class.

    Returns:
        At least one class, in natural order of their names; of each, images in natural order of their paths (see list_images). The masks
        are ``ground_truth/<defect>/<name>_mask.png`` as in MVTec AD, or ``<name>.png``.

    Raises:
        ValueError: there is no such file or folder, no image in it, or a folder that cannot be read.
        TypeError: source is no path and no sequence of paths.
    """
    if not isinstance(source, str | os.PathLike) or not os.path.isdir(source):
        return [DatasetClass("images", tuple(list_images(source)), (), ())]
    root = Path(source)
    if _is_class(root):
        classes = [_read_class(root)]
    else:
        try:
            folders = [folder for folder in root.iterdir() if not folder.name.startswith(".") and _is_class(folder)]
        except OSError as error:
            raise ValueError(f"read_dataset: expected source to be a folder that can be read, got {error}.") from error
        classes = [_read_class(folder) for folder in sorted(folders, key=lambda folder: natural_key(str(folder)))]
    if not classes:
        return [DatasetClass(_name_of(root), tuple(list_images(root)), (), ())]
    if not any(item.train or item.test for item in classes):
        raise ValueError(f"read_dataset: expected images in train/good and test of {str(root)!r}, got none.")
    return classes


def load_mask(path: str | os.PathLike[str], size: tuple[int, int]) -> Tensor:
    """The ground truth of an image: bool [H, W], True where the mask is not black.

    Args:
        path: the mask's file.
        size: (height, width) of the image.

    Raises:
        ValueError: the file cannot be read, or the mask is of another size.
    """
    mask = load_image(path)
    if (mask.height, mask.width) != size:
        raise ValueError(
            f"load_mask: expected {os.fspath(path)!r} to be of its image's size, {size[0]} x {size[1]} (height x width), got {mask.height} x {mask.width}."
        )
    pixels = torch.from_numpy(np.array(mask)) > 0  # [H, W] or [H, W, 3]
    return pixels if pixels.ndim == 2 else pixels.any(dim=2)


def _is_class(folder: Path) -> bool:
    return (folder / "train").is_dir() or (folder / "test").is_dir()


def _name_of(folder: Path) -> str:
    return os.path.basename(os.path.abspath(folder)) or "images"  # "." and ".." have names, too; "/" has none


def _read_class(folder: Path) -> DatasetClass:
    train = find_images(str(folder / "train" / _GOOD)) if (folder / "train" / _GOOD).is_dir() else []
    found = find_images(str(folder / "test")) if (folder / "test").is_dir() else []
    test = [image for path in found if (image := _labelled(folder, path)) is not None]
    problems = [] if train else ["train/good: no images to fit on."]
    if len(test) < len(found):
        problems.append(f"test: {len(found) - len(test)} images lie in no folder of a defect and are left out.")
    problems += _missing_labels(test)
    problems += _missing_masks(folder, test)
    return DatasetClass(_name_of(folder), tuple(train), tuple(test), tuple(problems))


def _labelled(folder: Path, path: str) -> LabelledImage | None:
    """None for an image that lies in ``test/`` itself."""
    below = Path(path).relative_to(folder / "test")
    if len(below.parts) < 2:
        return None
    if below.parts[0] == _GOOD:
        return LabelledImage(path, _GOOD, None)
    candidates = (folder / "ground_truth" / below.parent / (below.stem + suffix) for suffix in _MASK_SUFFIXES)
    return LabelledImage(path, below.parts[0], next((str(mask) for mask in candidates if mask.is_file()), None))


def _missing_labels(test: Sequence[LabelledImage]) -> Iterator[str]:
    defective = {image.is_defective for image in test}
    undefined = "metrics that compare good and defective images are undefined."
    if not test:
        yield "test: no images."
    elif defective == {True}:
        yield f"test/good: no images; {undefined}"
    elif defective == {False}:
        yield f"test: no images of defects; {undefined}"


def _missing_masks(folder: Path, test: Sequence[LabelledImage]) -> Iterator[str]:
    defective = [image for image in test if image.is_defective]
    if defective and not any(image.mask for image in defective):
        yield "ground_truth: no masks; metrics of pixels are undefined."
        return
    for defect, group in groupby(defective, lambda image: image.defect):
        images = list(group)
        missing = [image.path for image in images if image.mask is None]
        if missing and len(missing) == len(images):
            yield f"ground_truth/{defect}: no masks for {len(missing)} images, which metrics of pixels leave out."
        else:
            yield from (f"{Path(path).relative_to(folder)}: no mask; metrics of pixels leave the image out." for path in missing)
