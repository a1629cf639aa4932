"""The protocols of the study: which images are nominal and which are tested, on made-up folders in the data sets' layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from benchmarks.paper import mtd, shanghaitech
from benchmarks.paper.datasets import read
from patchcore_ext.layout import load_mask

EXPOSURES = 6


def write(path: Path, value: int = 100, size: tuple[int, int] = (20, 12)) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("L", size, value).save(path)
    return str(path)


@pytest.fixture
def public_tiles(tmp_path: Path) -> Path:
    """30 good tiles with six pictures each, and two with a blowhole; one of these has good pictures as well."""
    for tile in range(30):
        for exposure in range(EXPOSURES):
            name = f"exp{exposure + 1}_num_{1000 * (tile + 1) + 15 * exposure}"
            write(tmp_path / "MT_Free" / "Imgs" / f"{name}.jpg")
            write(tmp_path / "MT_Free" / "Imgs" / f"{name}.png", 0)
    for tile, exposures in ((3, (6, 7)), (90, range(EXPOSURES))):
        for exposure in exposures:
            name = f"exp{exposure % EXPOSURES + 1}_num_{1000 * tile + 15 * exposure}"
            write(tmp_path / "MT_Blowhole" / "Imgs" / f"{name}.jpg")
            write(tmp_path / "MT_Blowhole" / "Imgs" / f"{name}.png", 255)
    return tmp_path


def tile_of(path: str) -> int:
    return int(Path(path).stem.split("_")[-1]) // 1000


def test_no_tile_is_on_both_sides(public_tiles: Path) -> None:
    item, note = mtd.read(public_tiles, "tile")
    train, good = {tile_of(path) for path in item.train}, {tile_of(image.path) for image in item.test if not image.is_defective}
    assert not train & {tile_of(image.path) for image in item.test}
    assert 3 in good  # that tile has a defect, too
    assert train | good == set(range(1, 31))
    assert 36 <= EXPOSURES * len(good) <= 36 + EXPOSURES  # a fifth of 180, whole tiles
    assert "0 test tiles are in the training set" in note
    assert note.startswith("Split by tile")
    defects = [image for image in item.test if image.is_defective]
    assert len(defects) == 8
    assert all(image.defect == "blowhole" and image.mask == image.path.replace(".jpg", ".png") for image in defects)
    assert not any(path.endswith(".png") for path in item.train)
    assert mtd.read(public_tiles, "tile") == (item, note)
    assert mtd.read(public_tiles, "tile", seed=1)[0].train != item.train


def test_split_by_single_image_shares_tiles_and_says_so(public_tiles: Path) -> None:
    item, note = mtd.read(public_tiles, "image")
    good = [image.path for image in item.test if not image.is_defective]
    assert len(good) == 36
    shared = {tile_of(path) for path in item.train} & {tile_of(image.path) for image in item.test}
    assert len(shared) > 20
    assert f"{len(shared)} test tiles are in the training set as well" in note
    assert note.startswith("Split by single image")
    with pytest.raises(ValueError, match="has no split, got 'given'"):
        mtd.read(public_tiles, "given")
    dataset = read("mtd", public_tiles, cache=public_tiles / "cache")
    assert set(dataset.variants) == {"image"}
    assert dataset.variants["image"] == (item,)


def test_tiles_that_were_photographed_in_between_each_other_count_as_one() -> None:
    names = [f"exp1_num_{number}.jpg" for number in (10, 25, 40, 126, 300, 330, 431)]
    assert list(mtd.tiles(names).values()) == [10, 10, 10, 10, 300, 300, 431]
    with pytest.raises(ValueError, match="expected names of magnetic tiles like"):
        mtd.tiles(["tile.jpg"])


def test_magnetic_tiles_in_folders_are_split_again(tmp_path: Path) -> None:
    for tile in range(10):
        for exposure in range(EXPOSURES):
            part = "test" if exposure == 0 else "train"
            write(tmp_path / part / "good" / f"exp{exposure + 1}_num_{1000 * (tile + 1) + 15 * exposure}.jpg")
    write(tmp_path / "test" / "crack" / "exp1_num_90000.jpg")
    given = mtd.read(tmp_path, "given")
    assert len(given[0].train) == 50
    assert given[1] == "Split as given by the folders: 10 test tiles are in the training set as well."
    item, _ = mtd.read(tmp_path, "tile")
    assert len(item.train) == 48
    assert not {tile_of(path) for path in item.train} & {tile_of(image.path) for image in item.test}


def test_real_tiles_are_on_one_side(magnetic_tiles: Path) -> None:
    item, note = mtd.read(magnetic_tiles)
    assert (len(item.train), len(item.test)) == (761, 583)
    assert "0 test tiles are in the training set" in note
    # Pictures of a tile have about the same size and come one after the other: none of the other side may be near.
    train = np.array(sorted(int(Path(path).stem.split("_")[-1]) for path in item.train))
    test = np.array([int(Path(image.path).stem.split("_")[-1]) for image in item.test])
    assert np.abs(train[None] - test[:, None]).min() > mtd.SAME_TILE_GAP


FRAMES = 10


@pytest.fixture
def campus(tmp_path: Path) -> Path:
    """Two scenes with a training and a test video each; in the second half of the test videos a rectangle is anomalous."""
    masks = np.zeros((FRAMES, 12, 20), np.uint8)
    masks[5:, 2:6, 3:9] = 1
    for scene in ("01", "02"):
        for index in range(FRAMES):
            write(tmp_path / "training" / "frames" / f"{scene}_001" / f"{index:03d}.jpg")
            write(tmp_path / "testing" / "frames" / f"{scene}_0014" / f"{index:03d}.jpg")
        for kind, values in (("frame", masks.any((1, 2)).astype(np.int64)), ("pixel", masks)):
            (tmp_path / "testing" / f"test_{kind}_mask").mkdir(exist_ok=True)
            np.save(tmp_path / "testing" / f"test_{kind}_mask" / f"{scene}_0014.npy", values)
    return tmp_path


def test_campus_takes_every_other_frame_of_each_scene(campus: Path) -> None:
    dataset = read("mstc", campus, cache=campus / "cache")
    assert [item.name for item in dataset.classes] == ["01", "02"]
    assert (dataset.layers, dataset.transform(None).resize, dataset.transform(None).crop) == ((3, 4), (256, 256), None)
    item = dataset.classes[0]
    assert [Path(path).name for path in item.train] == ["000.jpg", "002.jpg", "004.jpg", "006.jpg", "008.jpg"]
    assert [(Path(image.path).name, image.is_defective) for image in item.test] == [
        ("000.jpg", False),
        ("002.jpg", False),
        ("004.jpg", False),
        ("006.jpg", True),
        ("008.jpg", True),
    ]
    assert all("/02_" not in path for path in item.train)
    mask = load_mask(item.test[3].mask or "", (12, 20))
    assert mask.sum() == 24
    assert mask[2:6, 3:9].all()
    assert item.test[0].mask is None


def test_campus_labels_come_from_the_pixels_where_there_is_no_frame_mask(campus: Path) -> None:
    expected = shanghaitech.read(campus, campus / "masks")
    (campus / "testing" / "test_frame_mask" / "01_0014.npy").unlink()
    assert shanghaitech.read(campus, campus / "masks") == expected
    (campus / "testing" / "test_pixel_mask" / "01_0014.npy").unlink()
    with pytest.raises(ValueError, match="got neither"):
        shanghaitech.read(campus, campus / "masks")


def test_campus_masks_must_fit_the_frames(campus: Path) -> None:
    np.save(campus / "testing" / "test_frame_mask" / "02_0014.npy", np.zeros(FRAMES - 1))
    with pytest.raises(ValueError, match="an entry for each of its 10 frames, got 9"):
        shanghaitech.read(campus, campus / "masks")


def test_campus_without_frames_is_explained(tmp_path: Path) -> None:
    (tmp_path / "training" / "videos").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"got 0 and 0 videos; take the \.avi files"):
        shanghaitech.read(tmp_path, tmp_path)


def make_class(folder: Path) -> None:
    for name in ("train/good/0.png", "train/good/1.png", "test/good/0.png", "test/dent/0.png"):
        write(folder / name)
    write(folder / "ground_truth" / "dent" / "0_mask.png", 255)


def test_mvtec_takes_its_classes_and_names_the_missing(tmp_path: Path) -> None:
    for name in ("bottle", "zipper", "results"):
        make_class(tmp_path / name)
    dataset = read("mvtec", tmp_path, cache=tmp_path)
    assert [item.name for item in dataset.classes] == ["bottle", "zipper"]
    assert "Missing classes: cable, capsule" in dataset.notes[0]
    assert (dataset.transform(None).resize, dataset.transform(None).crop) == ((256, 256), 224)
    assert (dataset.transform(320).resize, dataset.transform(320).crop) == ((366, 366), 320)
    assert dataset.classes[0].test[0].mask is not None
    make_class(tmp_path / "other" / "screws")
    with pytest.raises(ValueError, match="expected .* to hold classes of MVTec AD"):
        read("mvtec", tmp_path / "other", cache=tmp_path)


def test_limit_takes_a_few_images(tmp_path: Path) -> None:
    make_class(tmp_path)
    dataset = read("folder", tmp_path, cache=tmp_path, limit=1)
    assert (len(dataset.classes[0].train), len(dataset.classes[0].test)) == (1, 2)
    assert dataset.notes == ("A try: 1 nominal images of each class.",)


def test_solar_cells_are_those_of_the_table(tmp_path: Path) -> None:
    lines = []
    for index in range(446):
        lines.append(f"images/{index:04d}.png 0.0 mono")
    lines += ["images/a.png 1.0 mono", "images/b.png 0.333 mono", "images/c.png 1.0 poly"]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    item = read("elpv", tmp_path, cache=tmp_path).classes[0]
    assert (len(item.train), [image.defect for image in item.test]) == (440, ["good"] * 6 + ["defective"])
    assert item.test[-1].path == str(tmp_path / "images" / "a.png")
    assert not set(item.train) & {image.path for image in item.test}


def test_class_without_defects_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train" / "good" / "0.png")
    write(tmp_path / "test" / "good" / "0.png")
    with pytest.raises(ValueError, match="expected nominal images, and good and defective test images"):
        read("folder", tmp_path, cache=tmp_path)
