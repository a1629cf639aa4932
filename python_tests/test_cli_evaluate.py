"""``patchcore-ext evaluate``: the printed table, the files, the exit status, and bad data."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision
from small_model import images_of, write_images

import patchcore_ext
from patchcore_ext.cli import main


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    return path


def make_class(folder: Path) -> Path:
    write_images(folder / "train" / "good", images_of(20))
    write_images(folder / "test" / "good", images_of(2, seed=5))
    write_images(folder / "test" / "square", images_of(2, seed=6, defect=True))
    mask = np.zeros((24, 40), dtype=np.uint8)
    mask[8:16, 12:20] = 255
    (folder / "ground_truth" / "square").mkdir(parents=True)
    for index in range(2):
        PIL.Image.fromarray(mask).save(folder / "ground_truth" / "square" / f"{index:03d}_mask.png")
    return folder


def arguments(data: Path, weights: Path, *more: str | Path) -> list[str]:
    flags = ["--backbone", "resnet18", "--weights", weights, "--layers", "layer1", "layer2", "--resize", "32", "--device", "cpu", *more]
    return ["evaluate", str(data), *map(str, flags)]


def decompression_bomb(path: Path) -> None:
    """A PNG of a few bytes that says it has 60000 x 60000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def test_evaluate_prints_a_table_and_writes_the_results(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_class(tmp_path / "data" / "bolt")
    make_class(tmp_path / "data" / "nut")
    output = tmp_path / "deep" / "out"
    assert main(arguments(tmp_path / "data", weights, "-o", output, "--coreset-ratio", "0.05", "--false-alarm-rate", "0.2", "--save-maps", "tiff")) == 0
    printed = capsys.readouterr()
    *table, last = printed.out.splitlines()
    assert [line.split()[0] for line in table] == ["class", "bolt", "nut", "mean"]
    assert last == str(output / "results.json")
    content = json.loads((output / "results.json").read_text())
    assert table[1].split()[1:4] == [f"{100 * content['classes']['bolt'][name]:.2f}" for name in ("image_auroc", "pixel_auroc", "aupro")]
    settings = {name: content["settings"][name] for name in ("backbone", "coreset_ratio", "false_alarm_rate", "resize", "layers")}
    assert settings == {"backbone": "resnet18", "coreset_ratio": 0.05, "false_alarm_rate": 0.2, "resize": 32, "layers": ["layer1", "layer2"]}
    assert (output / "bolt" / "report.html").is_file()
    assert (output / "nut" / "maps" / "square" / "000.tiff").is_file()
    assert "Class bolt (1 of 2): 20 images to fit on, 4 to test." in printed.err
    # The second run takes everything over.
    assert main(arguments(tmp_path / "data", weights, "-o", output, "--coreset-ratio", "0.05", "--false-alarm-rate", "0.2", "--save-maps", "tiff")) == 0
    again = capsys.readouterr()
    assert again.out == printed.out
    assert again.err.count("Taken over from") == 2


def test_quiet_prints_the_table_alone(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_class(tmp_path / 'a "quoted"\n<script> name')
    shutil.rmtree(folder / "ground_truth")
    assert main(arguments(folder, weights, "--quiet")) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert len(printed.out.splitlines()) == 3
    assert printed.out.splitlines()[1].startswith('a "quoted"\\n<script> name')
    assert printed.out.splitlines()[2].split()[2:4] == ["-", "-"]


def test_unreadable_test_images_end_in_status_1_after_the_results(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_class(tmp_path / "data" / "bolt")
    (folder / "test" / "square" / "000.png").write_text("text")
    decompression_bomb(folder / "test" / "good" / 'b "omb"\n.png')
    for _ in range(2):  # the second one takes the results over, and says the same
        assert main(arguments(tmp_path / "data", weights, "-o", tmp_path / "out", "--quiet")) == 1
        printed = capsys.readouterr()
        assert printed.out.splitlines()[-1].startswith("mean")
        assert len(printed.err.splitlines()) == 1
        assert "got 2 of 5 that cannot be (the first is " in printed.err
    entry = json.loads((tmp_path / "out" / "results.json").read_text())["classes"]["bolt"]
    assert (entry["num_unreadable"], entry["num_good"], entry["num_defective"]) == (2, 2, 1)
    assert len(entry["problems"]) == 2


def failing(case: str, folder: Path, weights: Path) -> tuple[list[str], str]:
    """Arguments that must fail, and what must be said."""
    if case == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
        return arguments(folder, weights), "with none in it"
    if case == "missing folder":
        return arguments(folder / "none", weights), "none', which does not exist"
    if case == "plain folder":
        return arguments(folder / "train" / "good", weights), "expected images in test/<defect> and test/good of class 'good', got none"
    if case == "only defects":
        shutil.rmtree(folder / "train")
        shutil.rmtree(folder / "test" / "good")
        return arguments(folder, weights), "expected images in train/good of class 'bolt', got none"
    if case == "text as a training image":
        (folder / "train" / "good" / "003.png").write_text("text")
        return arguments(folder, weights), "003.png' to be a readable image"
    if case == "bomb as a training image":
        decompression_bomb(folder / "train" / "good" / "003.png")
        return arguments(folder, weights), "to be an image of ordinary size"
    if case == "missing weights":
        return arguments(folder, folder / "no.pth"), "there is no such file"
    if case == "output is a file":
        return arguments(folder, weights, "-o", weights), "that is a file; give the name of a folder"
    assert case == "output among the images"
    return arguments(folder, weights, "-o", folder / "test"), "expected the output folder to hold no image of the dataset"


CASES = [
    "empty folder",
    "missing folder",
    "plain folder",
    "only defects",
    "text as a training image",
    "bomb as a training image",
    "missing weights",
    "output is a file",
    "output among the images",
]


@pytest.mark.parametrize("case", CASES)
def test_failure_is_status_1_and_one_line(case: str, tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv, sentence = failing(case, make_class(tmp_path / "bolt"), weights)
    before = sorted(tmp_path.rglob("*"))
    assert main([*argv, "--quiet"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("patchcore-ext: error: ")
    assert sentence in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["evaluate"], "the following arguments are required: DATA"),
        (["evaluate", "data", "--save-maps", "npy"], "--save-maps needs -o DIR"),
        (["evaluate", "data", "--resize", "1", "2", "3"], "argument --resize: expected one or two numbers, got 3"),
        (["evaluate", "data", "--false-alarm-rate", "0"], "expected a number between 0 and 1, got '0'"),
    ],
)
def test_wrong_use_is_status_2_and_two_lines(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert sentence in first
    assert second == "See patchcore-ext evaluate --help."


def test_read_only_output_folder_is_refused_before_the_fit(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = make_class(tmp_path / "bolt"), tmp_path / "out"
    output.mkdir(mode=0o555)
    if os.access(output, os.W_OK):
        pytest.skip("root writes into read-only folders: the refusal was not seen")
    assert main(arguments(folder, weights, "-o", output)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not writable" in line


def test_full_disk_is_one_line_and_no_half_file(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_text = Path.write_text

    def full(self: Path, text: str, **options: Any) -> int:
        write_text(self, text[: len(text) // 2], **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_text", full)
    assert main(arguments(make_class(tmp_path / "bolt"), weights, "-o", tmp_path / "out", "--quiet")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("No space left on device")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in {".json", ".tmp", ".csv"}]


def test_ctrl_c_ends_it_with_130_and_no_half_file(tmp_path: Path, weights: Path) -> None:
    folder = make_class(tmp_path / "bolt")
    write_images(folder / "test" / "good" / "many", images_of(600, seed=7))
    command = [sys.executable, "-m", "patchcore_ext", *arguments(folder, weights, "-o", tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(Path(patchcore_ext.__file__).parents[1])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "out").rglob("*.png")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, "evaluate is too fast for this test: give it more to do"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, errors
    assert errors.endswith("patchcore-ext: interrupted\n")
    assert "Traceback" not in errors
    names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert not names & {"result.json", "results.json", "results.csv", "report.html"}
    assert not [name for name in names if name.endswith(".tmp")]
