"""``patchcore-ext inspect``: what a model file holds, for people and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_model import images_of, make_model, write_images

from patchcore_ext._cli_inspect import describe
from patchcore_ext._model_file import read_model
from patchcore_ext.cli import main
from patchcore_ext.memory_bank import MemoryBank
from patchcore_ext.patchcore import PatchCore


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PatchCore]:
    """A model file, whose images have a line break and a tag in their names, and the model in it."""
    folder = tmp_path_factory.mktemp("inspect")
    model = make_model().fit(write_images(folder / "two\nlines <script>", images_of(24)), progress=False, false_alarm_rate=0.2)
    model.save(folder / "model.safetensors")
    return folder / "model.safetensors", model


def test_json_is_what_the_file_holds(model: tuple[Path, PatchCore], capsys: pytest.CaptureFixture[str]) -> None:
    path, fitted = model
    assert main(["inspect", str(path), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["file_bytes"] == path.stat().st_size
    assert content["memory_bank"] == {"rows": len(fitted.bank), "dim": 14, "dtype": "float32", "bytes": fitted.bank.nbytes}
    assert content["backbone"] == {"name": "SmallNet", "weights": None, "digest": fitted.extractor.digest(), "custom": True, "included": False}
    assert content["settings"] == json.loads(json.dumps(fitted.settings))
    threshold = {"value": fitted.threshold, "threshold_from": "held-out images", "num_scores": 8, "false_alarm_rate": 0.2}
    assert {name: content["threshold"][name] for name in threshold} == threshold
    assert {name: content["images"][name] for name in ("fitted", "in_bank", "held_out")} == {"fitted": 24, "in_bank": 16, "held_out": 8}
    most_used = content["images"]["most_used"]
    assert fitted.bank.image_indices is not None
    rows = [fitted.bank.image_names[index] for index in fitted.bank.image_indices.tolist()]
    assert [entry["rows"] for entry in most_used] == sorted((rows.count(name) for name in set(rows)), reverse=True)[:5]
    assert all(entry["rows"] == rows.count(entry["path"]) for entry in most_used)


def test_text_says_the_same_on_a_line_each(model: tuple[Path, PatchCore], capsys: pytest.CaptureFixture[str]) -> None:
    path, fitted = model
    assert main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [tuple(line.split("  ", 1)) for line in lines]
    values = {name: text.strip() for name, text in shown}
    assert values["memory bank"] == f"{len(fitted.bank):,} rows x 14 float32, {fitted.bank.nbytes:,} bytes"
    assert values["backbone"] == "SmallNet, weights of its own, not in the file"
    assert values["threshold"] == f"{fitted.threshold:.6g}"
    assert values["found from"] == "8 held-out images"
    assert values["layers"] == "first, second"
    assert "two\\nlines <script>" in values["most used"]


def test_bank_without_provenance_has_no_most_used_images(model: tuple[Path, PatchCore]) -> None:
    _, record = read_model(model[0])
    content = describe(MemoryBank(torch.ones(3, 2)), record, 100)
    assert content["images"]["most_used"] == []
    assert content["memory_bank"] == {"rows": 3, "dim": 2, "dtype": "float32", "bytes": 24}


@pytest.mark.parametrize("case", ["missing", "bank alone", "text"])
def test_other_files_are_status_1_and_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    if case == "bank alone":
        MemoryBank(torch.ones(2, 2)).save(path)
    if case == "text":
        path.write_text("text")
    assert main(["inspect", str(path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert str(path) in printed.err
