"""Data sets and their protocols: which images are nominal, which are tested, at what size, and what is measured."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from patchcore_ext.images import ImageTransform
from patchcore_ext.layout import DatasetClass, LabelledImage, read_dataset

from . import mtd, published, shanghaitech

__all__ = ["DATASETS", "Dataset", "read"]


@dataclass(frozen=True)
class Dataset:
    """The classes of a data set and its protocol.

    Attributes:
        name: what --dataset takes.
        title: for tables.
        classes: one model each.
        layers: numbers of the hierarchies that are used where a row does not say.
        size: side of the network's input.
        cropped: images are stretched to 256/224 of the size and cropped in the middle; else they are stretched to the size.
        measures_pixels: rows are measured by pixels as well, not only the main ones.
        variants: the classes with other splits, by their names.
        notes: sentences on splits and on what is missing.
    """

    name: str
    title: str
    classes: tuple[DatasetClass, ...]
    layers: tuple[int, ...] = (2, 3)
    size: int = 224
    cropped: bool = True
    measures_pixels: bool = True
    variants: dict[str, tuple[DatasetClass, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def transform(self, size: int | None) -> ImageTransform:
        """What images go through for a network input of this side; None: the protocol's own."""
        side = self.size if size is None else size
        return ImageTransform(resize=(round(side * 256 / 224),) * 2, crop=side) if self.cropped else ImageTransform(resize=(side, side))


def _checked(classes: Sequence[DatasetClass]) -> tuple[DatasetClass, ...]:
    for item in classes:
        if not item.train or {image.is_defective for image in item.test} != {True, False}:
            raise ValueError(f"paper: expected nominal images, and good and defective test images, of class {item.name!r}, got {len(item.train)} nominal ones "
                             f"and {len(item.test)} of the test.")  # fmt: skip
    return tuple(classes)


def _mvtec(root: Path, split: str, cache: Path) -> Dataset:
    classes = [item for item in read_dataset(root) if item.name in published.CLASSES]
    if not classes:
        raise ValueError(
            f"paper: expected {str(root)!r} to hold classes of MVTec AD ({', '.join(published.CLASSES)}), got none; --dataset folder takes others."
        )
    missing = [name for name in published.CLASSES if name not in {item.name for item in classes}]
    notes = (f"Missing classes: {', '.join(missing)}; means are of the others.",) if missing else ()
    return Dataset("mvtec", "MVTec AD", _checked(classes), notes=notes)


def _folder(root: Path, split: str, cache: Path) -> Dataset:
    return Dataset("folder", root.name, _checked(read_dataset(root)))


def _mtd(root: Path, split: str, cache: Path) -> Dataset:
    item, note = mtd.read(root, split)
    others = {name: mtd.read(root, name) for name in mtd.SPLITS if name != split and (name != "given" or not mtd.is_public(root))}
    notes = (note, *(text for _, text in others.values()))
    variants = {name: _checked([classes]) for name, (classes, _) in others.items()}
    return Dataset("mtd", "magnetic tiles", _checked([item]), measures_pixels=False, variants=variants, notes=notes)


def _mstc(root: Path, split: str, cache: Path) -> Dataset:
    classes, notes = shanghaitech.read(root, cache / "masks")
    return Dataset("mstc", "ShanghaiTech Campus", _checked(classes), layers=(3, 4), size=256, cropped=False, notes=notes)


def _elpv(root: Path, split: str, cache: Path) -> Dataset:
    """Monocrystalline solar cells: 440 of the good ones are nominal; a shuffle with a fixed seed."""
    table = root / "labels.csv"
    if not table.is_file():
        raise ValueError(
            f"paper: expected {str(root)!r} to hold labels.csv of the ELPV data set, got none; the package elpv-dataset has it in its folder data."
        )
    cells = [line.split() for line in table.read_text(encoding="ascii").splitlines()]
    of = {probability: [str(root / path) for path, p, kind in cells if kind == "mono" and float(p) == probability] for probability in (0.0, 1.0)}
    for paths in of.values():
        random.Random(0).shuffle(paths)
    test = [LabelledImage(path, "good", None) for path in of[0.0][440:]] + [LabelledImage(path, "defective", None) for path in of[1.0]]
    item = DatasetClass("elpv_mono", tuple(of[0.0][:440]), tuple(test), ())
    note = "Monocrystalline cells; those that the experts doubted are left out. Cells of one module are on both sides of the split."
    return Dataset("elpv", "solar cells (ELPV)", _checked([item]), measures_pixels=False, notes=(note,))


DATASETS: dict[str, Callable[[Path, str, Path], Dataset]] = {"mvtec": _mvtec, "mtd": _mtd, "mstc": _mstc, "folder": _folder, "elpv": _elpv}


def read(name: str, root: str | os.PathLike[str], *, split: str = "tile", cache: Path, limit: int | None = None) -> Dataset:
    """The data set under a folder.

    Args:
        name: one of DATASETS.
        root: its folder.
        split: of the magnetic tiles, see mtd.read.
        cache: a folder for what has to be written, such as masks.
        limit: use at most so many nominal images, and twice as many of the test, of each class (evenly from beginning to end): for a try.

    Raises:
        ValueError: it is not there, or not in the layout.
    """
    if not Path(root).is_dir():
        raise ValueError(f"paper: expected ROOT to be the folder of a data set, got {os.fspath(root)!r}.")
    dataset = DATASETS[name](Path(root), split, cache)
    if limit is None:
        return dataset

    def few(classes: tuple[DatasetClass, ...]) -> tuple[DatasetClass, ...]:
        return _checked([replace(item, train=_evenly(item.train, limit), test=_evenly(item.test, 2 * limit)) for item in classes])

    variants = {name: few(classes) for name, classes in dataset.variants.items()}
    return replace(dataset, classes=few(dataset.classes), variants=variants, notes=(*dataset.notes, f"A try: {limit} nominal images of each class."))


def _evenly(items: tuple, count: int) -> tuple:  # type: ignore[type-arg]
    return items if len(items) <= count else tuple(items[i * len(items) // count] for i in range(count))
