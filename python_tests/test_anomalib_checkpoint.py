"""Memory banks out of anomalib's files, and files that would like to run something."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from patchcore_ext import PatchScorer
from patchcore_ext.integrations.anomalib import memory_bank_from_checkpoint


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(30, 12, generator=torch.Generator().manual_seed(0))


def as_saved_by_anomalib(monkeypatch: pytest.MonkeyPatch, name: str, base: type = object) -> type:
    """A class that pickles under one of anomalib's names, and cannot be imported once the test looks for it."""
    module_name, _, class_name = name.rpartition(".")
    parts = module_name.split(".")
    for i in range(len(parts)):
        path = ".".join(parts[: i + 1])
        monkeypatch.setitem(sys.modules, path, ModuleType(path))
    made = type(class_name, (base,), {"__module__": module_name})
    setattr(sys.modules[module_name], class_name, made)
    return made


def test_checkpoint_gives_rows_and_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: Tensor) -> None:
    with monkeypatch.context() as context:
        precision = as_saved_by_anomalib(context, "anomalib_like.PrecisionType")
        precision.__reduce__ = lambda self: (type(self), ("float32",))  # type: ignore[assignment, method-assign]
        precision.__init__ = lambda self, value: None  # type: ignore[assignment, misc]
        told = {"backbone": "resnet18", "layers": ["layer2", "layer3"], "num_neighbors": 9, "precision": precision("float32"), "evaluator": True}
        told["precision"].__class__.__module__ = "anomalib"
        context.setitem(sys.modules, "anomalib", sys.modules["anomalib_like"])
        state = OrderedDict({"_is_fitted": torch.tensor([True]), "model.memory_bank": rows, "model.conv.weight": torch.ones(2, 2)})
        torch.save({"state_dict": state, "hyper_parameters": told, "epoch": 1}, tmp_path / "model.ckpt")
    bank = memory_bank_from_checkpoint(tmp_path / "model.ckpt")
    assert torch.equal(bank.features, rows)
    assert bank.metadata == {"anomalib": {"backbone": "resnet18", "layers": ["layer2", "layer3"], "num_neighbors": 9, "precision": "float32"}}
    assert bank.image_indices is None
    assert PatchScorer(bank, score="anomalib")(rows[None]).image_scores.shape == (1,)
    bank.save(tmp_path / "bank.safetensors")


def test_export_of_a_whole_model_gives_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: Tensor) -> None:
    with monkeypatch.context() as context:
        whole: Any = as_saved_by_anomalib(context, "anomalib.models.image.patchcore.lightning_model.Patchcore", nn.Module)()
        whole.model = as_saved_by_anomalib(context, "anomalib.models.image.patchcore.torch_model.PatchcoreModel", nn.Module)()
        whole.model.register_buffer("memory_bank", rows.half())
        whole.model.conv = nn.Conv2d(3, 4, 3)
        whole._hparams = as_saved_by_anomalib(context, "lightning.fabric.utilities.data.AttributeDict", dict)(num_neighbors=5, backbone="resnet18")
        torch.save({"model": whole}, tmp_path / "model.pt")
    bank = memory_bank_from_checkpoint(tmp_path / "model.pt")
    assert torch.equal(bank.features, rows.half())
    assert bank.metadata["anomalib"] == {"backbone": "resnet18", "num_neighbors": 5}


def test_plain_state_dict_and_text_path_are_read(tmp_path: Path, rows: Tensor) -> None:
    torch.save({"memory_bank": rows.bfloat16()}, tmp_path / "state.pt")
    assert torch.equal(memory_bank_from_checkpoint(str(tmp_path / "state.pt")).features, rows.bfloat16())


class _RunsACommand:
    def __init__(self, callee: Any, *arguments: Any) -> None:
        self.callee, self.arguments = callee, arguments

    def __reduce__(self) -> Any:
        return self.callee, self.arguments

    def __call__(self) -> None:
        """Lets pickle take one for the callee of another."""


@pytest.mark.parametrize("callee", ["os.system", "subprocess.call", "builtins.exec", "builtins.eval", "builtins.getattr", "pathlib.touch"])
@pytest.mark.parametrize("place", ["hyper_parameters", "model", "state_dict"])
def test_a_malicious_file_runs_nothing(tmp_path: Path, rows: Tensor, callee: str, place: str) -> None:
    mark = tmp_path / "it-ran"
    command = f"touch {mark}"
    python = f"open({str(mark)!r}, 'w').close()"
    attacks: dict[str, _RunsACommand] = {
        "os.system": _RunsACommand(os.system, command),
        "subprocess.call": _RunsACommand(subprocess.call, ["touch", str(mark)]),
        "builtins.exec": _RunsACommand(exec, python),
        "builtins.eval": _RunsACommand(eval, python),
        "builtins.getattr": _RunsACommand(_RunsACommand(getattr, mark, "touch")),  # allowed names, made into a call
        "pathlib.touch": _RunsACommand(Path.touch, mark),
    }
    content: dict[str, Any] = {"state_dict": {"model.memory_bank": rows}}
    if place == "state_dict":
        content[place]["other"] = attacks[callee]
    else:
        content[place] = attacks[callee]
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"model\.ckpt.*(nothing of it was run|cannot be read safely)"):
        memory_bank_from_checkpoint(tmp_path / "model.ckpt")
    assert not mark.exists()
    torch.load(tmp_path / "model.ckpt", weights_only=False)  # the attack is one: an ordinary load runs it
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, "no entry is named memory_bank"),
        ({"state_dict": {"a.memory_bank": torch.ones(2, 2), "b.memory_bank": torch.ones(2, 2)}}, r"got 2: \['a.memory_bank', 'b.memory_bank'\]"),
        ({"state_dict": {"model.memory_bank": torch.empty(0)}}, "saved before it was fitted"),
        ({"state_dict": {"model.memory_bank": torch.tensor([[1.0, torch.nan]])}}, "row 0"),
        ([1, 2], "no entry is named memory_bank"),
        ({"model": 3}, "no entry is named memory_bank"),
    ],
)
def test_files_without_one_whole_bank_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=message):
        memory_bank_from_checkpoint(tmp_path / "model.ckpt")


def test_files_of_another_kind_are_refused(tmp_path: Path, rows: Tensor) -> None:
    path = tmp_path / "model.ckpt"
    with pytest.raises(FileNotFoundError, match="existing file"):
        memory_bank_from_checkpoint(path)
    path.write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ValueError, match="zip archive"):
        memory_bank_from_checkpoint(path)
    torch.save({"memory_bank": rows}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut off"):
        memory_bank_from_checkpoint(path)
    for place in range(0, len(whole), 97):  # bytes gone bad: an error that names the file, or, in a tensor's values, another bank
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with contextlib.suppress(ValueError):
            memory_bank_from_checkpoint(path)
