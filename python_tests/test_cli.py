"""The command line: what it writes and prints, its exit status, and that no bad input ends in a traceback."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import torchvision
from small_model import images_of, make_model, write_images

import patchcore_ext
from patchcore_ext import cli
from patchcore_ext._cli_options import model_settings
from patchcore_ext.cli import main
from patchcore_ext.memory_bank import MemoryBank
from patchcore_ext.patchcore import PatchCore


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """good/ and test/{good,bad}/ with images, weights.pth, and model.safetensors fitted on them."""
    folder = tmp_path_factory.mktemp("cli")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(torchvision.models.resnet18(weights=None).state_dict(), folder / "weights.pth")
    write_images(folder / "good", images_of(22))
    write_images(folder / "test" / "good", images_of(2, seed=5))
    write_images(folder / "test" / "bad", images_of(2, seed=5, defect=True))
    assert main([*fit_arguments(folder), "-o", str(folder / "model.safetensors"), "--quiet"]) == 0
    return folder


def fit_arguments(folder: Path) -> list[str]:
    weights = str(folder / "weights.pth")
    return ["fit", str(folder / "good"), "--backbone", "resnet18", "--weights", weights, "--layers", "layer1", "layer2", "--resize", "32", "--device", "cpu"]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "patchcore_ext", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(patchcore_ext.__file__).parents[1])}


# fit


def test_fit_writes_a_model_with_the_settings_of_the_flags(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "model.safetensors"
    flags = "--coreset-ratio 0.05 --num-neighbors 3 --crop 24 28 --false-alarm-rate 0.2 --seed 4 --include-backbone"
    assert main([*fit_arguments(place), "-o", str(output), *flags.split()]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{output}: ")
    assert "of 22 images, threshold" in printed.out
    assert "Threshold" in printed.err
    model = PatchCore.load(output)
    chosen = {key: model.settings[key] for key in ("layers", "coreset_ratio", "num_neighbors", "resize", "crop", "seed")}
    assert chosen == {"layers": ["layer1", "layer2"], "coreset_ratio": 0.05, "num_neighbors": 3, "resize": 32, "crop": (24, 28), "seed": 4}
    assert model.fit_report["false_alarm_rate"] == 0.2
    assert model.extractor.backbone_name == "resnet18"
    assert list(tmp_path.iterdir()) == [output]


def test_fit_twice_gives_the_same_bytes_and_quiet_says_nothing(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*fit_arguments(place), "-o", str(tmp_path / "model"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "model").read_bytes() == (place / "model.safetensors").read_bytes()


def test_default_resize_stretches_to_256(place: Path) -> None:
    arguments = cli._parser().parse_args(["fit", "data", "-o", "model"])
    assert model_settings(arguments, cli._parser())["resize"] == (256, 256)
    assert model_settings(arguments, cli._parser())["crop"] is None


# predict


def test_predict_prints_a_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(place / "model.safetensors"), str(place / "test"), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    header, *lines = printed.out.splitlines()
    assert header.split() == ["path", "score", "verdict"]
    expected = list(PatchCore.load(place / "model.safetensors", device="cpu").predict(place / "test"))
    for line, prediction in zip(lines, expected, strict=True):
        path, score, verdict = line.split()
        assert path == prediction.path
        assert float(score) == pytest.approx(prediction.score, rel=1e-5)
        assert verdict == ("anomalous" if prediction.is_anomalous else "good")
    assert [line.split()[2] for line in lines if "/bad/" in line] == ["anomalous"] * 2
    assert "of 4 images above the threshold" in printed.err


def test_threshold_flag_overrides(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["predict", str(place / "model.safetensors"), str(place / "test"), "--quiet"]
    for threshold, verdict in (("1e9", "good"), ("-1", "anomalous")):
        assert main([*arguments, "--threshold", threshold]) == 0
        assert {line.split()[2] for line in capsys.readouterr().out.splitlines()[1:]} == {verdict}


def test_predict_writes_a_result_folder(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [str(place / "test" / "bad"), str(place / "test" / "good" / "000.png")]
    output = tmp_path / "out"
    assert main(["predict", str(place / "model.safetensors"), *sources, "-o", str(output), "--save-maps", "npy"]) == 0
    assert capsys.readouterr().out == f"{output / 'report.html'}\n"
    with open(output / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["heat_map"] for row in rows] == ["heat_maps/bad/000.png", "heat_maps/bad/001.png", "heat_maps/good/000.png"]
    assert all((output / row["map"]).is_file() for row in rows)
    assert PIL.Image.open(output / rows[0]["heat_map"]).size == (40, 24)
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "resnet18, layer1 + layer2" in page
    assert json.loads((output / "results.json").read_text())["num_images"] == 3


def test_heat_maps_of_an_earlier_run_are_no_input(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path, images_of(2))
    for _ in range(2):
        assert main(["predict", str(place / "model.safetensors"), str(tmp_path), "-o", str(tmp_path / "out"), "--quiet"]) == 0
        assert json.loads((tmp_path / "out" / "results.json").read_text())["num_images"] == 2
    assert main(["predict", str(place / "model.safetensors"), str(tmp_path), "-o", str(tmp_path)]) == 1
    assert "expected images outside the output folder" in capsys.readouterr().err


@pytest.mark.parametrize("output", [True, False])
def test_unreadable_images_are_named_and_left_out_and_end_in_status_1(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: bool) -> None:
    paths = write_images(tmp_path / "two\nlines", images_of(4))
    Path(paths[1]).write_text("text")
    Path(paths[3]).write_bytes(Path(paths[3]).read_bytes()[:200])
    argv = ["predict", str(place / "model.safetensors"), str(tmp_path / "two\nlines"), "--device", "cpu", "--quiet"]
    assert main([*argv, "-o", str(tmp_path / "out")] if output else argv) == 1
    printed = capsys.readouterr()
    first, second, last = printed.err.splitlines()
    assert "two\\nlines/001.png' to be a readable image" in first
    assert "two\\nlines/003.png' to be a readable image" in second
    assert last == "patchcore-ext: error: expected images that can be read, got 2 of 4 that cannot be; the results leave them out."
    if output:
        assert json.loads((tmp_path / "out" / "results.json").read_text())["num_images"] == 2
        assert "2 images that cannot be read" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    else:
        assert [line.split()[0].endswith(name) for line, name in zip(printed.out.splitlines()[1:], ["000.png", "002.png"], strict=True)] == [True, True]


def test_images_of_which_none_can_be_read_give_no_results(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "image.png").write_text("text")
    assert main(["predict", str(place / "model.safetensors"), str(tmp_path), "-o", str(tmp_path / "out")]) == 1
    assert "got 1 of 1 that cannot be" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


# info and the frame


def test_info_tells_the_build(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    readable = capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info == json.loads(json.dumps(patchcore_ext.build_info()))
    for key, value in patchcore_ext.build_info().items():
        assert any(line.split(None, 1) == [key, str(value)] for line in readable.splitlines()), key


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"patchcore-ext {patchcore_ext.__version__}\n"


def test_reader_that_leaves_early_is_no_traceback(place: Path) -> None:
    arguments = command("predict", place / "model.safetensors", place / "test", "--quiet")
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 1
    assert errors == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["learn"], "invalid choice: 'learn'"),
        (["fit", "data"], "the following arguments are required: -o/--output"),
        (["fit", "data", "-o", "m", "--coreset-ratio", "0"], "expected a number above 0 and at most 1, got '0'"),
        (["fit", "data", "-o", "m", "--coreset-ratio", "many"], "expected a number above 0 and at most 1, got 'many'"),
        (["fit", "data", "-o", "m", "--false-alarm-rate", "1"], "expected a number between 0 and 1, got '1'"),
        (["fit", "data", "-o", "m", "--false-alarm-rate", "nan"], "expected a number between 0 and 1, got 'nan'"),
        (["fit", "data", "-o", "m", "--num-neighbors", "1.5"], "expected a whole number of at least 1, got '1.5'"),
        (["fit", "data", "-o", "m", "--seed", "-1"], "expected a whole number of at least 0, got '-1'"),
        (["fit", "data", "-o", "m", "--resize", "1", "2", "3"], "argument --resize: expected one or two numbers, got 3"),
        (["fit", "data", "-o", "m", "--crop", "0"], "expected a whole number of at least 1, got '0'"),
        (["predict", "m"], "the following arguments are required: IMAGES"),
        (["predict", "m", "i", "--save-maps", "npy"], "--save-maps needs -o DIR"),
        (["predict", "m", "i", "-o", "out", "--save-maps", "jpg"], "invalid choice: 'jpg'"),
        (["predict", "m", "i", "--threshold", "high"], "invalid float value: 'high'"),
        (["info", "--all"], "unrecognized arguments: --all"),
    ],
)
def test_wrong_use_is_status_2_and_two_lines(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("patchcore-ext: error: ")
    assert sentence in first
    assert second.startswith("See patchcore-ext")


def failing(case: str, place: Path, tmp_path: Path) -> tuple[list[str], str]:
    """Arguments that must fail, and what must be said."""
    model, test, output = str(place / "model.safetensors"), str(place / "test"), str(tmp_path / "new.safetensors")
    fit = [*fit_arguments(place), "-o", output]
    empty, half, other, custom = tmp_path / "empty", tmp_path / "half.safetensors", tmp_path / "other.pth", tmp_path / "custom"
    empty.mkdir()
    half.write_bytes(Path(model).read_bytes()[: Path(model).stat().st_size // 2])
    if case == "another backbone":
        torch.save(torchvision.models.resnet18(weights=None).state_dict(), other)
    if case == "custom backbone":
        make_model().fit(images_of(2), progress=False).save(custom)
    if case == "bank alone":
        MemoryBank(torch.ones(2, 2)).save(custom)
    if case == "broken image":
        (empty / "broken.png").write_bytes((place / "good" / "000.png").read_bytes()[:70])
    cases: dict[str, tuple[list[str], str]] = {
        "missing folder": (["fit", str(tmp_path / "none"), *fit[2:]], "none', which does not exist"),
        "empty folder": (["fit", str(empty), *fit[2:]], "with none in it"),
        "broken image": (["fit", str(empty), *fit[2:]], "broken.png"),
        "missing output folder": ([*fit[:-1], str(tmp_path / "no" / "model")], "no' does not exist; make it first"),
        "output is a folder": ([*fit[:-1], str(tmp_path)], "that is a folder; give the name of a file"),
        "unknown layer": ([*fit, "--layers", "layer2", "layer7"], "got 'layer7'. Did you mean"),
        "unknown backbone": ([*fit, "--backbone", "resnet17"], "got 'resnet17'"),
        "missing weights": ([*fit, "--weights", str(tmp_path / "no.pth")], "there is no such file"),
        "no cuda": ([*fit, "--device", "cuda"], "got 'cuda', but CUDA is not available; use 'cpu' or 'auto'."),
        "unknown device": ([*fit, "--device", "abacus"], "expected device to be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'abacus'"),
        "crop too large": ([*fit, "--crop", "99"], "expected crop to fit into the resized image"),
        "missing model": (["predict", str(tmp_path / "none.safetensors"), test], "none.safetensors', which does not exist"),
        "half a model": (["predict", str(half), test], "half.safetensors', which is incomplete: it has"),
        "not a model": (["predict", str(place / "weights.pth"), test], "weights.pth', which is another kind of file"),
        "bank alone": (["predict", str(custom), test], "a memory bank alone"),
        "custom backbone": (["predict", str(custom), test], "a custom SmallNet"),
        "another backbone": (["predict", model, test, "--weights", str(other)], "made with another backbone"),
        "missing images": (["predict", model, str(tmp_path / "none")], "none', which does not exist"),
        "no images": (["predict", model, str(empty)], "with none in it"),
        "threshold nan": (["predict", model, test, "--threshold", "nan", "-o", str(tmp_path / "out")], "expected threshold to be a finite number, got nan"),
        "output is a file": (["predict", model, test, "-o", str(half)], "that is a file; give the name of a folder"),
    }
    return cases[case]


CASES = [
    "missing folder",
    "empty folder",
    "broken image",
    "missing output folder",
    "output is a folder",
    "unknown layer",
    "unknown backbone",
    "missing weights",
    "no cuda",
    "unknown device",
    "crop too large",
    "missing model",
    "half a model",
    "not a model",
    "bank alone",
    "custom backbone",
    "another backbone",
    "missing images",
    "no images",
    "threshold nan",
    "output is a file",
]


@pytest.mark.parametrize("case", CASES)
def test_failure_is_status_1_and_one_line(case: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if case == "no cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    arguments, sentence = failing(case, place, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main([*arguments, "--quiet"]) == 1
    printed = capsys.readouterr()
    line, *more = printed.err.splitlines()
    assert more == []
    assert line.startswith("patchcore-ext: error: ")
    assert sentence in line
    assert sorted(tmp_path.rglob("*")) == before, "a failed command leaves nothing behind"


def test_module_runs_and_fails_without_a_traceback(place: Path, tmp_path: Path) -> None:
    arguments = command("predict", place / "model.safetensors", tmp_path / "none")
    result = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1


def test_file_name_that_the_terminal_cannot_show(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.rename(write_images(tmp_path, images_of(1))[0], os.path.join(os.fsencode(tmp_path), b"bad\xff.png"))
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["predict", str(place / "model.safetensors"), str(tmp_path), "--quiet"]) == 0
    terminal.seek(0)
    assert "bad\\udcff.png" in terminal.read()


@pytest.mark.parametrize("error", [RuntimeError("a bug"), AttributeError("a bug"), AssertionError("a bug")])
def test_programming_errors_are_not_hidden(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(PatchCore, "fit", fail)
    with pytest.raises(type(error), match="a bug"):
        main([*fit_arguments(place), "-o", str(tmp_path / "model"), "--quiet"])


def test_log_handler_is_taken_off_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("patchcore_ext")
    before = (list(log.handlers), log.level)
    main(["info"])
    main(["predict", "none", str(place)])
    assert (log.handlers, log.level) == before


# Ctrl-C


@pytest.mark.parametrize(
    ("stage", "marker", "count", "flags"),
    [
        ("features", "Fitting resnet18", 60, ["--resize", "512"]),
        ("coreset", "Features of", 300, ["--resize", "128", "--coreset-ratio", "0.9"]),  # 77,000 rows
    ],
)
def test_ctrl_c_in_fit_ends_it_within_two_seconds(place: Path, tmp_path: Path, stage: str, marker: str, count: int, flags: list[str]) -> None:
    data = tmp_path / "data"
    write_images(data, images_of(count, height=64, width=64))
    arguments: list[str | Path] = [*fit_arguments(place)[2:], *flags, "-o", tmp_path / "out" / "model.safetensors"]
    (tmp_path / "out").mkdir()
    process = subprocess.Popen(command("fit", data, *arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if marker in line:
                break
        else:
            pytest.fail(f"fit ended before it said {marker!r}")
        time.sleep(0.3)
        assert process.poll() is None, "fit is too fast for this test: give it more to do"
        process.send_signal(signal.SIGINT)
        sent = time.perf_counter()
        _, errors = process.communicate(timeout=30)
        seconds = time.perf_counter() - sent
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert errors == "patchcore-ext: interrupted\n"
    assert seconds < 2
    assert list((tmp_path / "out").iterdir()) == []


def test_ctrl_c_while_the_model_is_written_keeps_the_old_one(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "model.safetensors"
    output.write_bytes((place / "model.safetensors").read_bytes())

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("patchcore_ext.memory_bank.save_file", interrupt)
    assert main([*fit_arguments(place), "-o", str(output), "--seed", "3", "--quiet"]) == 130
    assert output.read_bytes() == (place / "model.safetensors").read_bytes()
    assert list(tmp_path.iterdir()) == [output]
