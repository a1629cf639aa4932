"""MVTec AD's layout: which images are found, what they are taken for, and what is said about what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import write
from PIL import Image

from patchcore_ext.layout import DatasetClass, LabelledImage, load_mask, read_dataset, training_folder


def make_class(folder: Path) -> Path:
    for name in ("train/good/10.png", "train/good/9.png", "test/good/0.png", "test/crack/0.png", "test/crack/1.jpg", "test/hole/0.png"):
        write(folder / name)
    for name in ("crack/0_mask.png", "crack/1_mask.png", "hole/0.png"):
        write(folder / "ground_truth" / name)
    return folder


def test_class_folder_gives_its_images_in_natural_order(tmp_path: Path) -> None:
    folder = make_class(tmp_path / "bottle")
    assert read_dataset(folder) == [
        DatasetClass(
            "bottle",
            train=(str(folder / "train/good/9.png"), str(folder / "train/good/10.png")),
            test=(
                LabelledImage(str(folder / "test/crack/0.png"), "crack", str(folder / "ground_truth/crack/0_mask.png")),
                LabelledImage(str(folder / "test/crack/1.jpg"), "crack", str(folder / "ground_truth/crack/1_mask.png")),
                LabelledImage(str(folder / "test/good/0.png"), "good", None),
                LabelledImage(str(folder / "test/hole/0.png"), "hole", str(folder / "ground_truth/hole/0.png")),
            ),
            problems=(),
        )
    ]
    assert [image.is_defective for image in read_dataset(str(folder))[0].test] == [True, True, False, True]


def test_class_is_named_after_its_folder_however_it_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_class(tmp_path / "bottle")
    monkeypatch.chdir(folder)
    assert [item.name for source in (".", "../bottle/", str(folder) + "/") for item in read_dataset(source)] == ["bottle"] * 3


def test_root_gives_its_class_folders_in_natural_order(tmp_path: Path) -> None:
    for name in ("part 10", "part 9", "<script>", 'a "quoted" name', "two\nlines", ".hidden"):
        make_class(tmp_path / name)
    write(tmp_path / "results" / "0.png")
    (tmp_path / "license.txt").write_text("text")
    assert [item.name for item in read_dataset(tmp_path)] == ["<script>", 'a "quoted" name', "part 9", "part 10", "two\nlines"]
    assert all(len(item.test) == 4 and not item.problems for item in read_dataset(tmp_path))


def test_images_without_labels_are_good_ones_of_a_single_class(tmp_path: Path) -> None:
    paths = [write(tmp_path / "photos" / "b" / "2.png"), write(tmp_path / "photos" / "1.png")]
    assert read_dataset(tmp_path / "photos") == [DatasetClass("photos", (paths[1], paths[0]), (), ())]
    assert read_dataset(paths) == [DatasetClass("images", tuple(paths), (), ())]
    assert read_dataset(paths[0]) == [DatasetClass("images", (paths[0],), (), ())]


@pytest.mark.parametrize(
    ("removed", "problems"),
    [
        (["train"], ["train/good: no images to fit on."]),
        (["test/good"], ["test/good: no images; metrics that compare good and defective images are undefined."]),
        (["test/crack", "test/hole"], ["test: no images of defects; metrics that compare good and defective images are undefined."]),
        (["test"], ["test: no images."]),
        (["ground_truth"], ["ground_truth: no masks; metrics of pixels are undefined."]),
        (["ground_truth/crack"], ["ground_truth/crack: no masks for 2 images, which metrics of pixels leave out."]),
        (["ground_truth/crack/1_mask.png"], ["test/crack/1.jpg: no mask; metrics of pixels leave the image out."]),
        (
            ["train/good/9.png", "train/good/10.png", "test/good"],
            ["train/good: no images to fit on.", "test/good: no images; metrics that compare good and defective images are undefined."],
        ),
    ],
)
def test_what_is_missing_is_told(tmp_path: Path, removed: list[str], problems: list[str]) -> None:
    folder = make_class(tmp_path / "bottle")
    for name in removed:
        # Out of the class, not deleted: a folder that is moved keeps its images.
        (folder / name).rename(tmp_path / name.replace("/", "-"))
    (item,) = read_dataset(folder)
    assert list(item.problems) == problems


def test_images_outside_a_defect_folder_are_counted(tmp_path: Path) -> None:
    folder = make_class(tmp_path / "bottle")
    write(folder / "test" / "stray.png")
    (item,) = read_dataset(folder)
    assert len(item.test) == 4
    assert item.problems == ("test: 1 images lie in no folder of a defect and are left out.",)


def test_sources_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    (tmp_path / "class" / "train" / "good").mkdir(parents=True)
    (tmp_path / "class" / "test").mkdir()
    cases: list[tuple[Any, type[Exception], str]] = [
        (tmp_path / "none", ValueError, "none', which does not exist"),
        (tmp_path / "empty", ValueError, "empty' with none in it"),
        (tmp_path / "class", ValueError, r"expected images in train/good and test of '.*class', got none"),
        ([], ValueError, "got an empty sequence"),
        (7, TypeError, "got int"),
    ]
    for source, kind, sentence in cases:
        with pytest.raises(kind, match=sentence):
            read_dataset(source)


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P", "I;16"])
def test_mask_is_true_where_it_is_not_black(tmp_path: Path, mode: str) -> None:
    expected = np.zeros((5, 7), dtype=bool)
    expected[1:3, 2:6] = True
    image = Image.fromarray(expected.astype(np.uint16)) if mode == "I;16" else Image.fromarray(expected.astype(np.uint8) * 255).convert(mode)
    mask = load_mask(write(tmp_path / "mask.png", image), (5, 7))
    assert mask.dtype == torch.bool
    assert np.array_equal(mask.numpy(), expected)


def test_mask_of_another_size_or_no_image_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"load_mask: expected '.*mask\.png' to be of its image's size, 5 x 6 \(height x width\), got 6 x 5\."):
        load_mask(path, (5, 6))
    Path(path).write_text("text")
    with pytest.raises(ValueError, match=r"mask\.png' to be a readable image"):
        load_mask(path, (6, 5))


def test_a_class_is_fitted_on_its_good_training_images_alone(tmp_path: Path) -> None:
    for place in ("part/train/good", "part/test/crack", "part/ground_truth/crack", "plain"):
        (tmp_path / place).mkdir(parents=True)
    assert training_folder(str(tmp_path / "part")) == str(tmp_path / "part" / "train" / "good")
    assert training_folder(str(tmp_path / "plain")) == str(tmp_path / "plain")
    assert training_folder(str(tmp_path / "absent")) == str(tmp_path / "absent")
