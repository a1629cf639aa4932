"""The magnetic tiles (Huang, Qiu, Yuan 2020, "Surface defect saliency of magnetic tile"): finding the images, and splitting the good ones.

Each tile is photographed up to six times, once for each exposure, one picture after the other: exp1_num_1810.jpg, exp2_num_1836.jpg and so on. Whoever
draws single images has nearly every test tile in the training set, and flatters every method with a memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from patchcore_ext.images import find_images
from patchcore_ext.layout import DatasetClass, LabelledImage, read_dataset

SPLITS = ("tile", "image", "given")
TEST_SHARE = 0.2
SAME_TILE_GAP = 100  # picture numbers; pictures of a tile lie 10 to 80 apart, tiles mostly several hundred
_NAME = re.compile(r"exp\d+_num_(\d+)")


def read(root: Path, split: str = "tile", seed: int = 0) -> tuple[DatasetClass, str]:
    """The tiles as one class, and a sentence on the split.

    Args:
        root: in the public layout (MT_Free/Imgs/*.jpg, MT_Blowhole/Imgs/*.jpg with masks *.png beside them) or in that of MVTec AD.
        split: of the good images: "tile": a seeded fifth or a little more, whole tiles, and all good images of tiles that also have defects; "image": a seeded
            fifth of single images; "given": as the folders say (only in MVTec AD's layout).
        seed: of the split.

    Raises:
        ValueError: another layout or split.
    """
    good, defects, given = _public(root) if is_public(root) else _mvtec_layout(root)
    if split == "given":
        if given is None:
            raise ValueError("paper: expected --split to be tile or image for the public layout of the magnetic tiles, which has no split, got 'given'.")
        return given, f"Split as given by the folders: {_shared_tiles(given)} test tiles are in the training set as well."
    test_good = _whole_tiles(good, defects, seed) if split == "tile" else _single_images(good, seed)
    train = tuple(path for path in good if path not in test_good)
    item = DatasetClass("magnetic_tiles", train, (*(LabelledImage(path, "good", None) for path in good if path in test_good), *defects), ())
    rule = "Split by tile" if split == "tile" else "Split by single image"
    shared = _shared_tiles(item)
    return item, f"{rule}, seed {seed}: {len(test_good)} of {len(good)} good images are test; {shared} test tiles are in the training set as well."


def is_public(root: Path) -> bool:
    """Whether the folder is in the public layout, which has no split of its own."""
    return (root / "MT_Free").is_dir()


def _mvtec_layout(root: Path) -> tuple[tuple[str, ...], tuple[LabelledImage, ...], DatasetClass | None]:
    classes = read_dataset(root)
    if len(classes) != 1 or not classes[0].test:
        raise ValueError(f"paper: expected {str(root)!r} to hold MT_Free and so on, or train and test, got neither.")
    item = classes[0]
    good = (*item.train, *(image.path for image in item.test if not image.is_defective))
    return tuple(sorted(good, key=_order)), tuple(image for image in item.test if image.is_defective), item


def _public(root: Path) -> tuple[tuple[str, ...], tuple[LabelledImage, ...], None]:
    good = [path for path in find_images(str(root / "MT_Free")) if path.lower().endswith(".jpg")]  # the .png beside them are masks
    defects = []
    for folder in sorted(root.glob("MT_*")):
        if folder.name != "MT_Free" and folder.is_dir():
            for path in find_images(str(folder)):
                if path.lower().endswith(".jpg"):
                    mask = Path(path).with_suffix(".png")
                    defects.append(LabelledImage(path, folder.name.removeprefix("MT_").lower(), str(mask) if mask.is_file() else None))
    return tuple(sorted(good, key=_order)), tuple(defects), None


def _number(path: str) -> int:
    found = _NAME.search(Path(path).name)
    if found is None:
        raise ValueError(f"paper: expected names of magnetic tiles like exp1_num_1810.jpg, got {path!r}; --split given takes others.")
    return int(found.group(1))


def _order(path: str) -> tuple[int, str]:
    found = _NAME.search(Path(path).name)
    return (int(found.group(1)) if found else 0, Path(path).name)


def tiles(paths: Iterable[str]) -> dict[str, int]:
    """The tile of each image, as the number of its first picture: pictures whose numbers follow each other within SAME_TILE_GAP are of one.

    Tiles that were photographed in between each other, or close together, count as one: a group may hold several tiles, but no tile is in two groups.
    """
    found: dict[str, int] = {}
    tile = last = -(10**9)
    for path in sorted(paths, key=lambda path: (_number(path), path)):
        if _number(path) - last > SAME_TILE_GAP:
            tile = _number(path)
        last = _number(path)
        found[path] = tile
    return found


def _whole_tiles(good: tuple[str, ...], defects: tuple[LabelledImage, ...], seed: int) -> set[str]:
    of = tiles([*good, *(image.path for image in defects)])
    test = {of[image.path] for image in defects}
    others = sorted({of[path] for path in good} - test)
    for index in np.random.default_rng(seed).permutation(len(others)):
        if sum(of[path] in test for path in good) >= TEST_SHARE * len(good):
            break
        test.add(others[index])
    return {path for path in good if of[path] in test}


def _single_images(good: tuple[str, ...], seed: int) -> set[str]:
    return {good[index] for index in np.random.default_rng(seed).permutation(len(good))[: round(TEST_SHARE * len(good))]}


def _shared_tiles(item: DatasetClass) -> int:
    of = tiles([*item.train, *(image.path for image in item.test)])
    return len({of[path] for path in item.train} & {of[image.path] for image in item.test})
