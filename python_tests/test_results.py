"""The result folder of `predict`: tables, heat maps, raw maps, and names that do not collide."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from small_model import images_of, write_images

from patchcore_ext._results import ResultFolder, unique_names
from patchcore_ext.patchcore import Prediction

THRESHOLD = 0.5


def predictions_of(paths: list[str], scores: list[float]) -> list[Prediction]:
    generator = torch.Generator().manual_seed(0)
    return [
        Prediction(path, score, torch.rand(24, 40, generator=generator) * score, score > THRESHOLD, THRESHOLD)
        for path, score in zip(paths, scores, strict=True)
    ]


def write_results(folder: Path, predictions: list[Prediction], save_maps: str | None = None) -> Path:
    results = ResultFolder(folder, [prediction.path for prediction in predictions], threshold=THRESHOLD, color_scale=THRESHOLD, save_maps=save_maps)
    for prediction in predictions:
        results.add(prediction)
    return results.finish("model.safetensors", {"Line": "text"})


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_tables_say_the_same_and_name_the_files(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "images" / "a", images_of(2)) + write_images(tmp_path / "images" / "b", images_of(2))
    predictions = predictions_of(paths, [0.1, 0.9, 0.5, 0.7])
    page = write_results(tmp_path / "out" / "deep", predictions, "npy")
    folder = tmp_path / "out" / "deep"
    assert page == folder / "report.html"
    result = json.loads((folder / "results.json").read_text())
    assert result["model"] == "model.safetensors"
    assert (result["num_images"], result["num_anomalous"], result["threshold"]) == (4, 2, THRESHOLD)
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, entry, prediction in zip(rows, result["predictions"], predictions, strict=True):
        assert row["path"] == entry["path"] == prediction.path
        assert float(row["score"]) == entry["score"] == prediction.score
        assert float(row["threshold"]) == THRESHOLD
        assert row["verdict"] == ("anomalous" if prediction.is_anomalous else "good")
        assert entry["is_anomalous"] == prediction.is_anomalous
        assert row["heat_map"] == entry["heat_map"]
        assert PIL.Image.open(folder / row["heat_map"]).format == "PNG"
        assert np.array_equal(np.load(folder / row["map"]), prediction.anomaly_map.numpy())
    names = {f"{kind}/{part}/{index:03d}.{suffix}" for kind, suffix in (("heat_maps", "png"), ("maps", "npy")) for part in "ab" for index in (0, 1)}
    assert everything_below(folder) == names | {"results.csv", "results.json", "report.html"}


@pytest.mark.parametrize("suffix", ["tiff", "png"])
def test_raw_maps_as_images(tmp_path: Path, suffix: str) -> None:
    paths = write_images(tmp_path / "images", images_of(2))
    predictions = predictions_of(paths, [0.8, 0.0])
    write_results(tmp_path / "out", predictions, suffix)
    for entry, prediction in zip(json.loads((tmp_path / "out" / "results.json").read_text())["predictions"], predictions, strict=True):
        image = PIL.Image.open(tmp_path / "out" / entry["map"])
        values = np.asarray(image)
        if suffix == "tiff":
            assert values.dtype == np.float32
            assert np.array_equal(values, prediction.anomaly_map.numpy())
        else:
            assert values.dtype == np.uint16
            assert float(image.info["map_scale"]) == entry["map_scale"]
            step = entry["map_scale"] / 65535
            assert np.abs(values * step - prediction.anomaly_map.numpy()).max() <= 0.51 * step


def test_same_stems_in_different_folders_stay_apart(tmp_path: Path) -> None:
    paths = [path for part in ("x", "y", "x/z") for path in write_images(tmp_path / "images" / part, images_of(1))]
    write_results(tmp_path / "out", predictions_of(paths, [0.1, 0.9, 0.3]))
    heat_maps = [entry["heat_map"] for entry in json.loads((tmp_path / "out" / "results.json").read_text())["predictions"]]
    assert heat_maps == ["heat_maps/x/000.png", "heat_maps/y/000.png", "heat_maps/x/z/000.png"]
    assert len({(tmp_path / "out" / name).read_bytes() for name in heat_maps}) == 3


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a.png"], ["a"]),
        (["a.png", "a.jpg", "a.bmp"], ["a", "a_jpg", "a_bmp"]),
        (["a.png", "A.png", "a_png.png"], ["a", "A_png", "a_png_png"]),
        (["x/a.png", "y/a.png"], ["x/a", "y/a"]),
        (["x/a.png", "x/b.png"], ["a", "b"]),
        (["x/a.png", "x/y/a.png"], ["a", "y/a"]),
        (["../x/a.png", "a.png"], None),
        (["/x/a.png", "/y/z/a.png"], ["x/a", "y/z/a"]),
        (["a.b.png", "a.c.png"], ["a.b", "a.c"]),
        (["noending", "noending."], ["noending", "noending_"]),
    ],
)
def test_names_are_unique_and_below_the_shared_folder(paths: list[str], names: list[str] | None) -> None:
    given = unique_names(paths)
    assert list(given) == paths
    assert len({name.casefold() for name in given.values()}) == len(paths)
    assert not any(name.startswith(("/", "..")) or "/../" in name for name in given.values())
    if names is not None:
        assert list(given.values()) == names


def test_same_path_twice_is_one_name() -> None:
    assert unique_names(["a.png", "a.png"]) == {"a.png": "a"}
    assert unique_names([]) == {}


def test_heat_maps_of_a_run_share_one_scale(tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path, [], threshold=9.0, color_scale=0.7, save_maps=None)
    assert folder.heat_map_range == pytest.approx((0.35, 1.05))
    assert ResultFolder(tmp_path, [], threshold=9.0, color_scale=0.0, save_maps=None).heat_map_range == (0.0, 1.0)


def test_page_has_all_images_and_the_colours_of_the_heat_maps(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "images", images_of(4))
    page = write_results(tmp_path / "out", predictions_of(paths, [0.2, 0.9, 0.5, 0.3])).read_text(encoding="utf-8")
    assert re.findall(r'class="score">([^<]*)<', page) == ["0.9", "0.5", "0.3", "0.2"]
    assert '"unknown": [0.2, 0.3, 0.5, 0.9]' in page
    assert "<dt>Called anomalous</dt><dd>1 of 4 images</dd>" in page
    assert "<dt>Line</dt><dd>text</dd>" in page
    assert ">0.25</span>" in page  # from half the threshold
    assert ">≥ 0.75</span>" in page


def test_what_is_known_reaches_the_page(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "images", images_of(2))
    folder = ResultFolder(tmp_path / "out", paths, threshold=THRESHOLD, color_scale=THRESHOLD, save_maps=None)
    bad, good = predictions_of(paths, [0.9, 0.2])
    folder.add(bad, defect="scratch", is_defective=True, mask=np.ones(bad.anomaly_map.shape, dtype=np.uint8))
    folder.add(good, is_defective=False)
    page = folder.finish("model", {}, metrics={"Image AUROC": 1.0, "AUPRO": None}).read_text(encoding="utf-8")
    assert '"defective": [0.9], "good": [0.2], "unknown": []' in page
    assert 'value="scratch"' in page
    assert "000.png, defect outlined" in page
    assert "<dt>Image AUROC</dt><dd>1.0000</dd>" in page
    assert "<dt>AUPRO</dt><dd>n/a</dd>" in page


def test_path_that_is_not_utf8_keeps_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    path = os.path.join(str(tmp_path / "images"), os.fsdecode(b"bad\xff.png"))
    os.rename(write_images(tmp_path / "images", images_of(1))[0], path)
    write_results(tmp_path / "out", predictions_of([path], [0.6]))
    assert b"bad\xff.png" in (tmp_path / "out" / "results.csv").read_bytes()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["predictions"][0]["path"] == path


def test_failed_page_leaves_no_half_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_images(tmp_path / "images", images_of(1))

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("patchcore_ext._results._write_table", fail)
    with pytest.raises(KeyboardInterrupt):
        write_results(tmp_path / "out", predictions_of(paths, [0.6]))
    assert everything_below(tmp_path / "out") == {"heat_maps/000.png", "results.json"}


def test_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="that is a file; give the name of a folder"):
        ResultFolder(tmp_path / "out", [], threshold=1.0, color_scale=1.0, save_maps=None)
