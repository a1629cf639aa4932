"""The study in benchmarks/paper on a made-up data set: its rows equal the package's own road, come out again, and go on where they stopped."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from small_model import images_of, write_images
from torch import nn

from benchmarks.paper import __main__ as command
from benchmarks.paper import exactness, methods, output, patches, published
from benchmarks.paper.backbones import Backbones, UnavailableError, layer_names
from benchmarks.paper.datasets import Dataset, read
from benchmarks.paper.maps import MapStore, in_threads
from benchmarks.paper.rows import ROWS, Row, chosen
from benchmarks.paper.study import Study
from patchcore_ext import CoresetSampler, PatchCore, PatchScorer
from patchcore_ext.features import FeatureExtractor
from patchcore_ext.metrics import PixelMetrics, image_auroc

SIZE = 64


class FourLayers(nn.Module):
    """Named like a ResNet, at a quarter to a thirty-second of the size."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layer1 = nn.Sequential(nn.Conv2d(3, 6, 5, stride=4, padding=2), nn.ReLU())
            self.layer2 = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU())
            self.layer3 = nn.Sequential(nn.Conv2d(8, 10, 3, stride=2, padding=1), nn.ReLU())
            self.layer4 = nn.Conv2d(10, 12, 3, stride=2, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer4(self.layer3(self.layer2(self.layer1(images))))
        return output


def make_class(folder: Path, seed: int, count: int = 12) -> None:
    def write(where: str, images: torch.Tensor) -> None:
        write_images(folder / where, nn.functional.interpolate(images, size=(60, 80)))

    write("train/good", images_of(count, seed=seed))
    write("test/good", images_of(4, seed=seed + 50))
    faint = 0.9 * images_of(4, seed=seed + 60) + 0.1 * images_of(4, seed=seed + 60, defect=True)
    write("test/square", faint)
    mask = torch.zeros(4, 3, 24, 40)
    mask[:, :, 8:16, 12:20] = 1
    write("ground_truth/square", mask)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    make_class(tmp_path / "data" / "bolt", 0)
    return replace(read("folder", tmp_path / "data", cache=tmp_path / "cache"), size=SIZE)


def study_of(dataset: Dataset, out: Path, **modules: nn.Module) -> Study:
    return Study(dataset, Backbones(modules={"four": FourLayers(), **modules}), "four", out, progress=False)


def numbers(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry["result"].items() if key != "seconds"}


# Rows


def test_patchcore_row_equals_the_model_of_the_package(dataset: Dataset, tmp_path: Path) -> None:
    item = dataset.classes[0]
    row = replace(ROWS["patchcore-10"], ratio=0.3)
    entry = study_of(dataset, tmp_path / "out").run_row(row, 0)["bolt"]

    # The model holds images back for its threshold, of fewer than 20 none.
    model = PatchCore(FourLayers(), ("layer2", "layer3"), coreset_ratio=0.3, resize=(73, 73), crop=64, device="cpu").fit(item.train, progress=False)
    predictions = list(model.predict([image.path for image in item.test]))
    assert [image["score"] for image in entry["result"]["images"]] == [prediction.score for prediction in predictions]
    labels = [image.is_defective for image in item.test]
    assert entry["result"]["image_auroc"] == image_auroc(labels, [prediction.score for prediction in predictions])
    pixels = PixelMetrics()
    seen = model.transform.seen_part(60, 80)
    for image, prediction in zip(item.test, predictions, strict=True):
        mask = None if image.mask is None else (np.array(PIL.Image.open(image.mask))[..., 0] > 0)[seen]
        pixels.update(mask, prediction.anomaly_map[seen])
    assert entry["result"]["pixel_auroc"] == pytest.approx(pixels.compute().pixel_auroc, rel=1e-12)
    assert entry["result"]["aupro"] == pytest.approx(pixels.compute().aupro, rel=1e-12)
    assert entry["facts"]["bank_rows"] == len(model.bank)


def test_picks_are_those_of_the_sampler_and_a_smaller_coreset_is_the_beginning_of_a_larger(dataset: Dataset, tmp_path: Path) -> None:
    study = study_of(dataset, tmp_path / "out")
    case = study.case(ROWS["patchcore-10"], dataset.classes[0], 3)
    rows = torch.cat([chunk.flatten(0, 1) for chunk in case.train.chunks()])
    expected = CoresetSampler(0.2, seed=3, progress=False).select(rows).indices
    small, large = methods.greedy_picks(case, 0.05), methods.greedy_picks(case, 0.2)
    assert torch.equal(large, expected)
    assert torch.equal(small, expected[: len(small)])
    (tmp_path / "out" / "cache" / "picks").rename(tmp_path / "elsewhere")
    assert torch.equal(methods.greedy_picks(case, 0.2), large)
    assert torch.equal(case.train.rows(large), rows[large])
    assert torch.equal(case.train.rows(), rows)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
def test_features_are_the_same_in_chunks_of_any_size(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_bytes: int) -> None:
    train = study_of(dataset, tmp_path).case(ROWS["patchcore-10"], dataset.classes[0], 0).train
    monkeypatch.setattr(patches, "_KEPT_BYTES", kept_bytes)
    whole, picks = train.rows(), torch.tensor([700, 3, 64, 65, 767, 320])
    assert len(whole) == 12 * 64
    for images, chunks in ((1, [1] * 12), (5, [5, 5, 2]), (12, [12])):
        monkeypatch.setattr(patches, "_CHUNK_PATCHES", images * 64)
        patches._kept.cache_clear()
        assert [len(chunk) for chunk in train.chunks()] == chunks
        assert torch.cat(list(train.chunks())).flatten(0, 1).equal(whole)
        assert train.rows().equal(whole)
        assert train.rows(picks).equal(whole[picks])
        assert train.projected(0).equal(whole)  # 18 dimensions: no more than the projection has
    patches._kept.cache_clear()


def test_wide_features_are_projected_as_the_sampler_projects_them(tmp_path: Path) -> None:
    make_class(tmp_path / "data", 0, count=3)
    dataset = replace(read("folder", tmp_path / "data", cache=tmp_path / "cache"), size=SIZE)
    wide = nn.Sequential()
    wide.layer2, wide.layer3 = nn.Conv2d(3, 100, 3, stride=8), nn.Conv2d(100, 90, 3, stride=2, padding=1)
    case = study_of(dataset, tmp_path / "out", wide=wide).case(replace(ROWS["patchcore-10"], backbone="wide"), dataset.classes[0], 2)
    rows = case.train.rows()
    assert rows.shape[1] == 190
    assert torch.equal(methods.greedy_picks(case, 0.5), CoresetSampler(0.5, seed=2, progress=False).select(rows).indices)


RUNNABLE = ("patchcore-100", "random-10", "proxies-1", "proxies-printed-1", "spade", "padim", "patch-9", "stride-3", "layers-123", "padim-shots-2")


@pytest.mark.parametrize("name", RUNNABLE)
def test_rows_come_out_again_on_one_thread_and_two(dataset: Dataset, tmp_path: Path, name: str) -> None:
    row = replace(ROWS[name], ratio=max(ROWS[name].ratio, 0.05))
    found = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        found.append({key: numbers(entry) for key, entry in study_of(dataset, tmp_path / str(threads)).run_row(row, 0).items()})
    assert found[0] == found[1]
    assert found[0]["bolt"]["num_train"] == (row.shots or 12)
    scores = [image["score"] for image in found[0]["bolt"]["images"]]
    assert len(set(scores)) == 8
    assert found[0]["bolt"]["image_auroc"] is not None


def test_approximate_search_is_close_to_the_exact_one(dataset: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="faiss is not installed: the row ivfpq-100 was not tested")
    study = study_of(dataset, tmp_path)
    case = study.case(ROWS["ivfpq-100"], dataset.classes[0], 0)
    exact, found = methods.patchcore(case), methods.approximate(case)
    assert found.image_scores.numpy() == pytest.approx(exact.image_scores.numpy(), rel=0.3)
    assert not torch.equal(found.parts[0][0], exact.parts[0][0])


def test_ensemble_is_the_mean_of_scores_brought_to_one_scale(dataset: Dataset, tmp_path: Path) -> None:
    study = study_of(dataset, tmp_path, other=FourLayers(seed=1))
    row = Row("pair", "", (), "ensemble", ratio=0.2, members=("four", "other"))
    case = study.case(row, dataset.classes[0], 0)
    found = methods.ensemble(case)
    expected, expected_maps = np.zeros(8), []
    for member in case.members:
        rows, picks = member.train.rows(), methods.greedy_picks(member, 0.2)
        patches = rows.view(12, -1, rows.shape[1])
        owners = picks // patches.shape[1]
        nominal = [PatchScorer(rows[picks[owners != image]])(patches[image]) for image in range(12)]
        scores = np.array([float(part.image_scores[0]) for part in nominal])
        every = torch.cat([part.patch_distances.double().flatten() for part in nominal])
        exact = methods.patchcore(member)
        expected += (exact.image_scores.numpy() - scores.mean()) / scores.std() / 2
        expected_maps.append((exact.parts[0][0] - float(every.mean())) / float(every.std()))
    assert found.image_scores.numpy() == pytest.approx(expected, rel=1e-9)
    assert all(torch.allclose(part[0], maps, rtol=1e-5) for part, maps in zip(found.parts, expected_maps, strict=True))
    case = replace(case, row=replace(row, options={"normalisation": "test min-max"}))
    minmax = methods.ensemble(case)
    assert not torch.equal(minmax.image_scores, found.image_scores)
    assert minmax.facts["normalisation"] == "test min-max"
    assert (float(minmax.image_scores.min()) >= 0, float(minmax.image_scores.max()) <= 1) == (True, True)


def test_low_shot_uses_so_many_images_chosen_by_the_seed(dataset: Dataset, tmp_path: Path) -> None:
    study = study_of(dataset, tmp_path)
    cases = [study.case(replace(ROWS["patchcore-10-shots-5"], shots=shots), dataset.classes[0], seed) for shots, seed in ((2, 0), (5, 0), (5, 1), (50, 0))]
    few, more, others, every = (case.train.paths for case in cases)
    assert (len(few), len(more), len(every)) == (2, 5, 12)
    assert more[:2] == few
    assert set(others) != set(more)


# Running


def test_interrupted_run_goes_on_and_makes_no_feature_again(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    maps, read_image = FeatureExtractor.maps, MapStore._read

    def counted(self: FeatureExtractor, images: torch.Tensor) -> Any:
        made.append(len(images))
        return maps(self, images)

    def interrupted(self: MapStore, path: str) -> Any:
        if sum(made) >= 8:  # the first batches are done
            raise KeyboardInterrupt
        return read_image(self, path)

    monkeypatch.setattr(FeatureExtractor, "maps", counted)
    torch.set_num_threads(1)
    with monkeypatch.context() as patch:
        patch.setattr(MapStore, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            study_of(dataset, tmp_path).run_row(ROWS["random-10"], 0)
    assert 8 <= sum(made) < 16
    first = study_of(dataset, tmp_path).run_row(ROWS["random-10"], 0)
    assert sum(made) == 20
    study = study_of(dataset, tmp_path)
    study.run_row(ROWS["patch-9"], 0)  # other neighbourhoods, same maps
    monkeypatch.setitem(methods.METHODS, "random", None)
    assert study.run_row(ROWS["random-10"], 0) == first
    unfinished = replace(study, only_finished=True).run(chosen(["random-10", "patch-5"]), 1)
    assert unfinished["random-10"]["runs"] == [first]
    assert unfinished["patch-5"] == {"unavailable": "not finished"}
    assert sum(made) == 20


def test_only_layers_that_are_missing_are_made(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, ...]] = []
    maps = FeatureExtractor.maps

    def noted(self: FeatureExtractor, images: torch.Tensor) -> Any:
        made.extend([self.layers] * len(images))
        return maps(self, images)

    monkeypatch.setattr(FeatureExtractor, "maps", noted)
    study = study_of(dataset, tmp_path / "some")
    study.run_row(ROWS["layers-2"], 0)
    found = study.run_row(ROWS["layers-123"], 0)
    assert made == [("layer2",)] * 20 + [("layer1", "layer3")] * 20
    assert numbers(found["bolt"]) == numbers(study_of(dataset, tmp_path / "all").run_row(ROWS["layers-123"], 0)["bolt"])


def test_threads_stop_at_the_first_error() -> None:
    begun: list[int] = []

    def work(part: int) -> None:
        begun.append(part)
        if part == 3:
            raise ValueError("part 3")

    torch.set_num_threads(2)
    with pytest.raises(ValueError, match="part 3"):
        list(in_threads(work, range(100)))
    assert len(begun) < 20


def test_unreadable_images(dataset: Dataset, tmp_path: Path) -> None:
    item = dataset.classes[0]
    Path(item.test[1].path).write_bytes(b"broken")
    entry = study_of(dataset, tmp_path / "one").run_row(ROWS["patchcore-10"], 0)["bolt"]["result"]
    assert (entry["num_unreadable"], entry["num_good"], entry["images"][1]["score"]) == (1, 3, None)
    assert item.test[1].path in entry["problems"][0]
    Path(item.train[0]).write_bytes(b"broken")
    with pytest.raises(ValueError, match="expected nominal images that can be read"):
        study_of(dataset, tmp_path / "two").run_row(ROWS["patchcore-10"], 0)


def page_of(dataset: Dataset, results: dict[str, Any]) -> str:
    return output.make(dataset, results, None, {"base": "four", "aggregation": "concat", "seeds": 2, "command": "x", "seconds": 1}).markdown([])


def test_row_without_weights_says_so_in_its_tables(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("PATCHCORE_EXT_RESNET18", raising=False)
    results = study_of(dataset, tmp_path).run(chosen(["patchcore-1", "wrn101-280-1", "resnet18-1", "patchcore-1-split-image"]), seeds=2)
    assert "no weights of wide_resnet101_2: give --weights-dir" in results["wrn101-280-1"]["unavailable"]
    assert "resnet18" in results["resnet18-1"]["unavailable"]
    assert "no split" in results["patchcore-1-split-image"]["unavailable"]
    page = page_of(dataset, results)
    lines = [line for line in page.splitlines() if line.startswith("| 280 px, WRN101 (2+3)")]
    assert "not run: no weights of wide_resnet101_2" in lines[0]
    assert "| 99.4 |" in lines[0]  # the paper's figure is there all the same
    assert next(line for line in page.splitlines() if line.startswith("| PatchCore-100%")).count("not asked for") == 1
    item = next(iter(results["patchcore-1"]["runs"][0]))
    other = {key: {**entry, "result": {**entry["result"], "image_auroc": 0.25}} for key, entry in results["patchcore-1"]["runs"][0].items()}
    for run, entry in zip(results["patchcore-1"]["runs"], [other[item], other[item]], strict=True):
        run["nut"] = entry
    page = page_of(dataset, results)
    values = [100 * np.mean([entry["result"]["image_auroc"] for entry in run.values()]) for run in results["patchcore-1"]["runs"]]
    assert f"| PatchCore-1% | 99.0 | {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} |" in page


def test_weights_in_the_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("PATCHCORE_EXT_RESNET18", raising=False)
    whole = FeatureExtractor("resnet18", ("layer2",), weights=None)
    torch.save(whole.backbone_state(), tmp_path / "resnet18-f37072fd.pth")
    backbones = Backbones(tmp_path)
    assert backbones.extractor("resnet18", ("layer2",)).digest() == whole.digest()
    with pytest.raises(UnavailableError, match="layer3"):  # the file ends before
        backbones.extractor("resnet18", ("layer3",))
    with pytest.raises(UnavailableError, match="no weights of resnet101: give --weights-dir"):
        backbones.extractor("resnet101", ("layer3",))


def test_command_writes_tables_and_figures_twice_the_same(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backbones, "extractor", lambda self, name, layers: FeatureExtractor(FourLayers(), layers))
    monkeypatch.setattr(exactness, "compare", None)  # not asked for
    contents = []
    for name in ("a", "b"):
        arguments = [str(tmp_path / "data"), "--rows", "patchcore-0.1", "random-0.1", "patchcore-1", "--seeds", "2", "--quiet", "--out", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["paper", *arguments])
        assert command.main() == 0
        contents.append(json.loads((tmp_path / name / "paper.json").read_text()))
    assert contents[0]["numbers_digest"] == contents[1]["numbers_digest"]
    assert contents[0]["tables"] != []
    assert set(contents[0]["rows"]) == {"patchcore-0.1", "patchcore-1", "random-0.1"}
    assert "images" not in contents[0]["rows"]["patchcore-1"]["runs"][0]["bolt"]["result"]
    figures = {path.name for path in (tmp_path / "a" / "figures").iterdir()}
    assert figures == {"retention.svg", "precision_recall.svg", "roc.svg"}
    page = (tmp_path / "a" / "paper.md").read_text()
    assert all(f"figures/{name}" in page for name in figures)
    assert "python -m benchmarks.paper ROOT --dataset folder" in page
    assert str(tmp_path) not in page.replace("](figures", "")


def test_command_explains_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def ends_with(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["paper", *arguments])
        return command.main(), capsys.readouterr().err

    assert "expected ROOT to be the folder" in ends_with(str(tmp_path / "nowhere"))[1]
    make_class(tmp_path / "data", 0)
    status, message = ends_with(str(tmp_path / "data"), "--rows", "patchcore-7")
    assert (status, "expected rows to be names that --list-rows prints" in message) == (1, True)
    monkeypatch.setattr(Study, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert ends_with(str(tmp_path / "data"), "--out", str(tmp_path / "out")) == (130, "paper: interrupted; the same command goes on with what is missing.\n")


# Rows and figures


def test_rows_cover_the_paper() -> None:
    wanted = {"patchcore-100", "patchcore-10", "patchcore-1", "random-1", "proxies-1", "ivfpq-100", "spade", "padim", "ensemble-1"}
    assert wanted <= set(ROWS)
    assert set(published.MEANS) <= set(ROWS)
    assert {row.patch_size for row in ROWS.values()} == {1, 3, 5, 7, 9}
    assert {row.stride for row in ROWS.values() if row.method == "patchcore"} == {1, 2, 3}
    assert {row.size for row in ROWS.values()} == {None, 280, 288, 320, 360, 448}
    assert [row.name for row in chosen(["stride", "patchcore-1", "stride"])] == ["stride-2", "stride-3", "patchcore-1"]


def test_published_figures_agree_with_their_means() -> None:
    for (name, metric), values in published.BY_CLASS.items():
        position = ("image_auroc", "pixel_auroc", "aupro").index(metric)
        assert len(values) == len(published.CLASSES)
        assert np.mean(values) == pytest.approx(published.MEANS[name][position], abs=0.11), (name, metric)
    assert all(len(values) == 7 for values in published.LOW_SHOT.values())


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [("resnet50", ("layer2", "layer3")), ("densenet201", ("features.denseblock2", "features.denseblock3")), ("efficientnet_b0", ("features.3", "features.5"))],
)
def test_layer_names(backbone: str, expected: tuple[str, ...]) -> None:
    assert layer_names(backbone, (2, 3)) == expected
    sizes = [values.shape[2] for values in FeatureExtractor(backbone, layer_names(backbone, (1, 2, 3)), weights=None).maps(torch.zeros(1, 3, 64, 64)).values()]
    assert sizes == [16, 8, 4]


def test_exactness_lines_name_what_differs(tmp_path: Path) -> None:
    rows = torch.randn(24 * 49, 20, generator=torch.Generator().manual_seed(0))
    files = {name: str(tmp_path / f"{name}.npy") for name in ("train", "test", "labels")}
    np.save(files["train"], rows.numpy())
    np.save(files["test"], (rows[: 6 * 49] + 0.1).numpy())
    np.save(files["labels"], np.arange(6) % 2 == 0)
    exact = exactness.measure({**files, "num_patches": 49, "method": "exact", "threads": 1})
    assert exact["picks"] == CoresetSampler(0.01, seed=0, progress=False).select(rows).indices.tolist()
    expanded = exactness.measure({**files, "num_patches": 49, "method": list(exactness.FLOAT32)[1], "threads": 1})
    assert expanded["picks"][0] == exact["picks"][0]
    assert len(set(expanded["picks"])) == len(exact["picks"]) == 11
    line = {"picks": 11, "picks_in_other_places": 2, "other_rows": 1, "scores_sha256": "ab" * 32, "same_scores": False, "image_auroc": 0.5}
    page = exactness.markdown([{"variant": "|x|", **line}, {"variant": "y", "error": "no compiler"}])
    assert r"| \|x\| | 11 | 2 | 1 | others (abababababab) | 0.5 |" in page
    assert "| y | not run: no compiler |" in page
