"""MemoryBank: what it holds, what it refuses, and that its file appears whole or not at all."""

from __future__ import annotations

import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from patchcore_ext import memory_bank
from patchcore_ext.memory_bank import FORMAT_VERSION, MemoryBank, atomic_write, check_output_path, read_tensors


def make_bank(num_rows: int = 12, dim: int = 5, dtype: torch.dtype = torch.float32, **options: Any) -> MemoryBank:
    generator = torch.Generator().manual_seed(3)
    return MemoryBank(
        torch.randn(num_rows, dim, generator=generator).to(dtype),
        image_indices=torch.arange(num_rows, dtype=torch.int32) % 3,
        positions=torch.stack((torch.arange(num_rows) // 4, torch.arange(num_rows) % 4), dim=1).int(),
        image_names=["a.png", "b/ü.png", "c.png"],
        **options,
    )


# What it holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bank_comes_back_from_its_file(tmp_path: Path, dtype: torch.dtype) -> None:
    bank = make_bank(dtype=dtype, metadata={"threshold": 0.1, "nested": {"list": [1, None, "x"]}})
    bank.save(tmp_path / "bank.safetensors")
    loaded = MemoryBank.load(tmp_path / "bank.safetensors")
    assert loaded.features.dtype == dtype
    assert torch.equal(loaded.features, bank.features)
    assert loaded.image_indices is not None
    assert bank.image_indices is not None
    assert torch.equal(loaded.image_indices, bank.image_indices)
    assert loaded.positions is not None
    assert bank.positions is not None
    assert torch.equal(loaded.positions, bank.positions)
    assert loaded.image_names == bank.image_names
    assert loaded.metadata == bank.metadata


def test_bank_without_provenance_comes_back(tmp_path: Path) -> None:
    MemoryBank(torch.ones(2, 3)).save(tmp_path / "bank.safetensors")
    loaded = MemoryBank.load(tmp_path / "bank.safetensors")
    assert (loaded.image_indices, loaded.positions, loaded.image_names, loaded.metadata) == (None, None, [], {})


def test_sizes() -> None:
    bank = make_bank(num_rows=7, dim=3, dtype=torch.float16)
    assert len(bank) == 7
    assert bank.dim == 3
    assert bank.nbytes == 7 * 3 * 2 + 7 * 4 + 7 * 2 * 4
    assert "7 rows x 3 float16" in repr(bank)


def test_numpy_arrays_are_taken() -> None:
    bank = MemoryBank(np.eye(3, dtype=np.float32), image_indices=np.array([0, 1, 1]), image_names=["a", "b"])
    assert torch.equal(bank.features, torch.eye(3))


def test_float64_is_rounded_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="float64"):
        bank = MemoryBank(torch.full((1, 1), 0.1, dtype=torch.float64))
    assert bank.features.dtype == torch.float32


def test_names_that_are_not_utf8_come_back(tmp_path: Path) -> None:
    name = os.fsdecode(b"bad\xff.png")
    MemoryBank(torch.ones(1, 1), image_names=[name]).save(tmp_path / "bank.safetensors")
    assert MemoryBank.load(tmp_path / "bank.safetensors").image_names == [name]


# What it refuses


@pytest.mark.parametrize("row", [0, 5, memory_bank._ROWS_PER_CHECK + 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_first_row_that_is_not_finite_is_named(row: int, value: float) -> None:
    features = torch.zeros(memory_bank._ROWS_PER_CHECK + 10, 2)
    features[row, 1] = value
    features[row + 3, 0] = value
    with pytest.raises(ValueError, match=rf"MemoryBank: expected features to be finite, got NaN or infinity in row {row};"):
        MemoryBank(features)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"features": torch.ones(3)}, ValueError, "expected features to be"),
        ({"features": torch.ones(0, 3)}, ValueError, "at least one row"),
        ({"features": torch.ones(3, 0)}, ValueError, "expected features to be"),
        ({"features": torch.ones(3, 2, dtype=torch.int32)}, TypeError, "float32, float16 or bfloat16"),
        ({"features": [[1.0]]}, TypeError, "expected features to be"),
        ({"image_indices": torch.zeros(2, dtype=torch.int64)}, ValueError, r"expected image_indices to be \[3\]"),
        ({"image_indices": torch.zeros(3)}, TypeError, "expected image_indices to be int32 or int64"),
        ({"image_indices": [0, 0, 0]}, TypeError, "expected image_indices to be a tensor"),
        ({"image_indices": torch.tensor([0, -1, 0])}, ValueError, "expected image_indices to be 0 or more, got -1"),
        ({"image_indices": torch.tensor([0, 2, 0]), "image_names": ["a", "b"]}, ValueError, "below 2, the number of image_names, got 2"),
        ({"positions": torch.zeros(3, 3, dtype=torch.int32)}, ValueError, r"expected positions to be \[3, 2\]"),
        ({"positions": torch.zeros(3, 2, dtype=torch.int16)}, TypeError, "expected positions to be int32 or int64"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=f"MemoryBank: .*{sentence}"):
        MemoryBank(**{"features": torch.ones(3, 2), **arguments})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.ones(1), b"bytes", {1, 2}])
def test_metadata_must_be_plain_json(tmp_path: Path, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"MemoryBank\.save: expected metadata to be plain JSON"):
        make_bank(metadata={"x": value}).save(tmp_path / "bank.safetensors")
    assert list(tmp_path.iterdir()) == []


# The file


def test_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    make_bank(metadata={"a": 1, "b": {"c": 2, "d": 3}}).save(tmp_path / "1", extra_tensors={"x.1": torch.ones(2), "x.2": torch.zeros(1)})
    make_bank().save(tmp_path / "2", {"b": {"d": 3, "c": 2}, "a": 1}, extra_tensors={"x.2": torch.zeros(1), "x.1": torch.ones(2)})
    MemoryBank.load(tmp_path / "1").save(tmp_path / "3", extra_tensors={"x.1": torch.ones(2), "x.2": torch.zeros(1)})
    first = (tmp_path / "1").read_bytes()
    assert first == (tmp_path / "2").read_bytes()
    assert first == (tmp_path / "3").read_bytes()


def test_rows_of_a_larger_tensor_are_written_alone(tmp_path: Path) -> None:
    features = torch.arange(40.0).view(10, 4)
    MemoryBank(features[2:8:2, 1:3]).save(tmp_path / "bank")
    assert torch.equal(MemoryBank.load(tmp_path / "bank").features, features[2:8:2, 1:3])
    assert (tmp_path / "bank").stat().st_size < 400


def test_extra_tensors_come_back_by_prefix(tmp_path: Path) -> None:
    weight = torch.arange(6.0).view(2, 3)
    # Tied weights share memory, which safetensors refuses; a transposed tensor is not contiguous.
    make_bank().save(tmp_path / "bank", extra_tensors={"net.a": weight, "net.b": weight, "net.c": weight.T, "other": torch.ones(1)})
    tensors = read_tensors(tmp_path / "bank", "net.")
    assert sorted(tensors) == ["a", "b", "c"]
    assert torch.equal(tensors["b"], weight)
    assert torch.equal(tensors["c"], weight.T)
    assert len(MemoryBank.load(tmp_path / "bank")) == 12
    with pytest.raises(ValueError, match="expected extra_tensors to have other names"):
        make_bank().save(tmp_path / "bank", extra_tensors={"positions": weight})


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors', which does not exist"):
        MemoryBank.load(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="which is a folder"):
        MemoryBank.load(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.3, 0.5, 0.9, 0.999])
def test_file_cut_off_is_called_incomplete(tmp_path: Path, share: float) -> None:
    path = tmp_path / "cut.safetensors"
    make_bank(num_rows=300).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"^MemoryBank\.load: .*cut\.safetensors', which is incomplete: .*Copy or write it again\.$"):
        MemoryBank.load(path)


def test_longer_file_is_called_damaged(tmp_path: Path) -> None:
    make_bank().save(tmp_path / "bank")
    with open(tmp_path / "bank", "ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="which is damaged"):
        MemoryBank.load(tmp_path / "bank")


class _Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_other_kinds_of_files_are_refused_and_never_unpickled(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(_Payload(str(trap))))
    torch.save({"weight": torch.ones(3)}, tmp_path / "weights.pth")
    (tmp_path / "text.safetensors").write_text("a model, honestly\n" * 20)
    for name in ("evil.pkl", "weights.pth", "text.safetensors"):
        with pytest.raises(ValueError, match=f"{name}', which is another kind of file"):
            MemoryBank.load(tmp_path / name)
    assert not trap.exists()


def test_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"features": torch.ones(2, 2)}, tmp_path / "foreign.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="a safetensors file of something else"):
        MemoryBank.load(tmp_path / "foreign.safetensors")


def test_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_bank, "FORMAT_VERSION", FORMAT_VERSION + 1)
    make_bank().save(tmp_path / "bank")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=rf"of version {FORMAT_VERSION + 1}: it was written by a newer patchcore_ext; upgrade"):
        MemoryBank.load(tmp_path / "bank")


@pytest.mark.parametrize("header", ["", "nonsense", "[]", "{}", '{"format_version":1}', '{"format_version":1,"image_names":[1],"metadata":{}}', "[" * 100_000])
def test_damaged_header_is_refused(tmp_path: Path, header: str) -> None:
    save_file({"features": torch.ones(2, 2)}, tmp_path / "bank", metadata={"patchcore_ext": header})
    with pytest.raises(ValueError, match="header is damaged"):
        MemoryBank.load(tmp_path / "bank")


def test_file_with_bad_tensors_is_named(tmp_path: Path) -> None:
    header = {"patchcore_ext": '{"format_version":1,"image_names":[],"metadata":{}}'}
    save_file({"rows": torch.ones(2, 2)}, tmp_path / "none", metadata=header)
    with pytest.raises(ValueError, match="none' without a tensor 'features'"):
        MemoryBank.load(tmp_path / "none")
    save_file({"features": torch.full((2, 2), float("nan"))}, tmp_path / "nan", metadata=header)
    with pytest.raises(ValueError, match=r"MemoryBank\.load: .*nan': MemoryBank: .*in row 0"):
        MemoryBank.load(tmp_path / "nan")


def test_any_damage_is_a_value_error(tmp_path: Path) -> None:
    path = tmp_path / "bank"
    make_bank().save(path)
    whole = path.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for place in random.integers(0, header_end, size=random.integers(1, 4)):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(bytes(damaged))
        try:
            MemoryBank.load(path)
        except ValueError:
            refused += 1
    assert refused > 200


# Whole or not at all


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), RuntimeError("bug")])
@pytest.mark.parametrize("step", ["save_file", "_flush_to_disk", "replace"])
def test_failed_save_keeps_the_old_file_and_leaves_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, step: str) -> None:
    path = tmp_path / "bank.safetensors"
    make_bank(num_rows=3).save(path)
    before = path.read_bytes()
    seen: list[Path] = []

    def fail(*arguments: Any, **_: Any) -> None:
        seen.extend(tmp_path.glob(".*"))
        if step == "save_file":
            Path(arguments[1]).write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(os if step == "replace" else memory_bank, step, fail)
    with pytest.raises(type(error)):
        make_bank(num_rows=9).save(path)
    monkeypatch.undo()
    assert len(seen) == 1, "the temporary file lies in the same folder"
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saved_file_has_ordinary_permissions_and_follows_links(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store" / "bank", tmp_path / "latest"
    link.symlink_to(target)
    mask = os.umask(0o027)
    try:
        make_bank().save(link)
    finally:
        os.umask(mask)
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert list((tmp_path / "store").iterdir()) == [target]


def test_paths_that_cannot_be_written_are_told_before_the_work(tmp_path: Path) -> None:
    assert check_output_path(tmp_path / "new") == tmp_path / "new"
    with pytest.raises(FileNotFoundError, match=r"the folder .*missing. does not exist; make it first"):
        check_output_path(tmp_path / "missing" / "bank")
    with pytest.raises(IsADirectoryError, match="that is a folder"):
        check_output_path(tmp_path)
    with pytest.raises(OSError, match="not a plain file"):
        check_output_path("/dev/null")
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "missing" / "bank"):
        pytest.fail("the block must not run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_write_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="not writable"):
            check_output_path(tmp_path / "bank")
    finally:
        tmp_path.chmod(0o700)


def test_atomic_write_replaces_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    with atomic_write(path, sync=False) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_write_that_fails_is_an_os_error_that_names_the_file(tmp_path: Path) -> None:
    """Safetensors reports a full disk as an error of its own, which once ended the command line with a traceback; a limit on file sizes does the same."""
    path = tmp_path / "bank.safetensors"
    script = f"""
import resource, signal, torch
from patchcore_ext import MemoryBank
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    MemoryBank(torch.zeros(4096, 8)).save({str(path)!r})
except OSError as error:
    print(error)
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout.startswith(f"Cannot write {str(path)!r}: ")
    assert list(tmp_path.iterdir()) == []
