"""The memory bank: patch features of good images with their provenance, and the one file format of this package.

A file is a safetensors file (no pickle, nothing is executed on loading) with these tensors:

======================  ====================  ====================================================================
name                    shape                 content
======================  ====================  ====================================================================
``features``            [M, D]                the rows, float32, float16 or bfloat16
``image_indices``       [M], optional         the image each row was taken from, an index into the image names
``positions``           [M, 2], optional      (row, column) of each row in the patch grid of its image
any other               any                   extra tensors of the writer, for example ``backbone.*`` of a model
======================  ====================  ====================================================================

and one header entry, ``patchcore_ext``: canonical JSON (sorted keys) of the format version, the image names and the writer's metadata. One
entry, because the order of several is not fixed: the same data always give the same bytes.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import _checks
from ._checks import ArrayLike

__all__ = ["FORMAT_VERSION", "MemoryBank", "atomic_write", "check_output_path", "read_tensors"]

FORMAT_VERSION = 1
"""Version of the file layout above; a file of a higher version is refused."""

_HEADER_KEY = "patchcore_ext"
_OWN_TENSORS = ("features", "image_indices", "positions")
_INDEX_DTYPES = (torch.int32, torch.int64)
_ROWS_PER_CHECK = 8192
# safetensors itself refuses longer headers, so a first word above this is not a cut-off file but another kind of file.
_LONGEST_HEADER = 100_000_000


class MemoryBank:
    """Patch features of good images (M in Roth et al. 2022, Eq. 4 and Algorithm 1, arXiv:2106.08265), and where each row came from.

    Args:
        features: rows of the bank, [M, D], M and D at least 1, float32, float16 or bfloat16, all finite; a tensor or a NumPy array. Not
            copied. float64 is rounded to float32 with a warning.
        image_indices: int32 or int64 [M], the image of each row as an index into ``image_names``; None: not known.
        positions: int32 or int64 [M, 2], (row, column) of each row in the patch grid of its image; None: not known.
        image_names: names of the images, usually their paths; may be empty.
        metadata: what the owner wants to keep with the bank; must survive a round trip through JSON.

    Attributes:
        features: Tensor [M, D].
        image_indices: Tensor [M] or None.
        positions: Tensor [M, 2] or None.
        image_names: list of str.
        metadata: dict.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit, an index outside ``image_names``, or a row with NaN or infinity (the first one is named).

    Example:
        >>> import torch
        >>> bank = MemoryBank(torch.eye(3), image_indices=torch.tensor([0, 0, 1]), image_names=["a.png", "b.png"])
        >>> len(bank), bank.dim, bank.nbytes
        (3, 3, 60)
    """

    features: Tensor
    image_indices: Tensor | None
    positions: Tensor | None
    image_names: list[str]
    metadata: dict[str, Any]

    def __init__(
        self,
        features: ArrayLike,
        *,
        image_indices: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        image_names: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.features = _checked_features(features)
        num_rows = self.features.shape[0]
        self.image_names = [str(name) for name in image_names]
        self.image_indices = None if image_indices is None else _checked_indices(image_indices, "image_indices", (num_rows,))
        self.positions = None if positions is None else _checked_indices(positions, "positions", (num_rows, 2))
        if self.image_indices is not None and self.image_names and int(self.image_indices.max()) >= len(self.image_names):
            raise ValueError(
                f"MemoryBank: expected image_indices to be below {len(self.image_names)}, the number of image_names, got {int(self.image_indices.max())}."
            )
        self.metadata = dict(metadata or {})

    def __len__(self) -> int:
        return self.features.shape[0]

    def __repr__(self) -> str:
        dtype = str(self.features.dtype).removeprefix("torch.")
        return f"MemoryBank({len(self)} rows x {self.dim} {dtype}, {len(self.image_names)} image names, {self.nbytes} bytes)"

    @property
    def dim(self) -> int:
        """Length D of a row."""
        return self.features.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held by the tensors: rows and provenance, without names and metadata."""
        held = (self.features, self.image_indices, self.positions)
        return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)

    def save(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, Any] | None = None,
        *,
        extra_tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes the bank to one safetensors file; the same data give the same bytes.

        The file appears whole or not at all: it is written under a temporary name in the same folder, flushed to the disk and then renamed.
        On a failure, Ctrl-C included, the temporary file is removed and an older file of that name stays as it was.

        Args:
            path: the file to write; its folder must exist.
            metadata: what to store instead of ``self.metadata``; JSON values only, no NaN or infinity.
            extra_tensors: further tensors to store; read them back with :func:`read_tensors`.

        Raises:
            OSError: the folder is missing, is not writable, or the disk is full.
            TypeError: metadata that is not JSON.
            ValueError: metadata with NaN or infinity, or an extra tensor with a name of the bank's own.
        """
        tensors = {"features": self.features, "image_indices": self.image_indices, "positions": self.positions}
        stored = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items() if tensor is not None}
        for name, tensor in (extra_tensors or {}).items():
            if name in _OWN_TENSORS:
                raise ValueError(f"MemoryBank.save: expected extra_tensors to have other names than {_OWN_TENSORS}, got {name!r}.")
            # A copy each: safetensors refuses tensors that share memory, as tied weights do.
            stored[name] = tensor.detach().to("cpu").contiguous().clone()
        header = {
            "format_version": FORMAT_VERSION,
            "image_names": self.image_names,
            "metadata": self.metadata if metadata is None else dict(metadata),
        }
        text = _canonical_json(header)
        with atomic_write(path) as temporary:
            try:
                save_file(stored, temporary, metadata={_HEADER_KEY: text})
            except SafetensorError as error:  # a full disk, for one
                raise OSError(f"Cannot write {os.fspath(path)!r}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> MemoryBank:
        """The bank in a file written by :meth:`save` or by ``PatchCore.save``.

        Args:
            path: the file.
            device: where the tensors go.

        Returns:
            The bank; its ``metadata`` is what was saved with it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is incomplete, is no safetensors file, is a safetensors file of something else, or was written by a newer
                version. The sentence names the file and says what to do.
        """
        with _opened(path) as (file, header):
            names = set(file.keys())
            if "features" not in names:
                raise ValueError(f"MemoryBank.load: expected path to hold a memory bank, got {os.fspath(path)!r} without a tensor 'features'.")
            tensors = {name: file.get_tensor(name).to(device) for name in _OWN_TENSORS if name in names}
        try:
            return cls(**tensors, image_names=header["image_names"], metadata=header["metadata"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"MemoryBank.load: expected path to hold a valid memory bank, got {os.fspath(path)!r}: {error}") from error


def read_tensors(path: str | os.PathLike[str], prefix: str) -> dict[str, Tensor]:
    """The extra tensors of a file whose names start with ``prefix``, on the CPU; the prefix is taken off.

    Args:
        path: a file written by :meth:`MemoryBank.save`.
        prefix: for example ``"backbone."``.

    Returns:
        Name to tensor; empty if there are none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as :meth:`MemoryBank.load`.
    """
    with _opened(path) as (file, _):
        return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118


def check_output_path(path: str | os.PathLike[str]) -> Path:
    """The file that a write to ``path`` will make (links followed), after checking that it can be made; call it before long work.

    Raises:
        OSError: the folder does not exist or is not writable, or ``path`` is a folder, a device or another thing that is no plain file.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"Cannot write {os.fspath(path)!r}: the folder {str(target.parent)!r} does not exist; make it first.")
    if target.is_dir():
        raise IsADirectoryError(f"Cannot write {os.fspath(path)!r}: that is a folder; give the name of a file.")
    if target.exists() and not target.is_file():
        raise OSError(f"Cannot write {os.fspath(path)!r}: that is not a plain file.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"Cannot write {os.fspath(path)!r}: the folder {str(target.parent)!r} is not writable.")
    return target


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[Path]:
    """Gives a temporary path in the folder of ``path``; what the block writes there becomes ``path`` when the block ends well.

    Readers see the old file or the whole new one. If the block fails, Ctrl-C included, the temporary file is removed and ``path`` stays as
    it was. A symbolic link is followed, not replaced.

    Args:
        path: the file to make.
        sync: flush the file and its folder to the disk, so that the file is whole after a power cut too; False for files that are cheap to
            make again.

    Yields:
        The temporary path, an empty file without a telling suffix.

    Raises:
        OSError: as :func:`check_output_path`, or what the file system says.
    """
    target = check_output_path(path)
    temporary = target.with_name(f".patchcore-ext-{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        permissions = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        # Some writers, safetensors among them, put a file of their own there that only its owner may read.
        temporary.chmod(permissions)
        if sync:
            _flush_to_disk(temporary)
        os.replace(temporary, target)
        if sync:
            _flush_to_disk(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checked_features(value: ArrayLike) -> Tensor:
    features = _checks.features("MemoryBank", "features", value)
    if features.shape[0] == 0:
        raise ValueError(f"MemoryBank: expected features to have at least one row, got shape {list(features.shape)}.")
    for start in range(0, features.shape[0], _ROWS_PER_CHECK):
        finite = torch.isfinite(features[start : start + _ROWS_PER_CHECK]).all(dim=1)  # [rows]
        if not bool(finite.all()):
            row = start + int((~finite).nonzero()[0])
            raise ValueError(f"MemoryBank: expected features to be finite, got NaN or infinity in row {row}; take that row out.")
    return features


def _checked_indices(value: ArrayLike, argument: str, shape: tuple[int, ...]) -> Tensor:
    indices = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    if not isinstance(indices, Tensor):
        raise TypeError(f"MemoryBank: expected {argument} to be a tensor or a NumPy array, got {type(value).__name__}.")
    if indices.dtype not in _INDEX_DTYPES:
        raise TypeError(f"MemoryBank: expected {argument} to be int32 or int64, got {indices.dtype}.")
    if tuple(indices.shape) != shape:
        raise ValueError(f"MemoryBank: expected {argument} to be {list(shape)}, one entry for each row, got {list(indices.shape)}.")
    if int(indices.min()) < 0:
        raise ValueError(f"MemoryBank: expected {argument} to be 0 or more, got {int(indices.min())}.")
    return indices


def _canonical_json(value: Mapping[str, Any]) -> str:
    # ASCII only: file names that are not UTF-8 travel as escaped surrogates.
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"MemoryBank.save: expected metadata to be plain JSON values without NaN or infinity, got: {error}.") from error


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The open safetensors file and our checked header."""
    name = os.fspath(path)
    if not os.path.exists(name):
        raise FileNotFoundError(f"MemoryBank.load: expected path to be an existing file, got {name!r}, which does not exist.")
    if not os.path.isfile(name):
        raise ValueError(f"MemoryBank.load: expected path to be a file, got {name!r}, which is a folder or a device.")
    try:
        file: Any = safe_open(name, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"MemoryBank.load: expected path to be a whole safetensors file, got {name!r}, {_what_is_wrong(name)}.") from error
    with file:
        yield file, _checked_header(name, file.metadata())


def _what_is_wrong(name: str) -> str:
    """Why safetensors refused a file: its own words do not tell a cut-off file from another kind of file."""
    size = os.path.getsize(name)
    with open(name, "rb") as file:
        start = file.read(9)
        if size < 8:
            return f"which is incomplete: it has only {size} bytes. Copy or write it again"
        header_length = struct.unpack("<Q", start[:8])[0]
        if header_length > _LONGEST_HEADER or start[8:9] not in (b"{", b""):
            return "which is another kind of file"
        if size < 8 + header_length:
            return f"which is incomplete: it ends inside its header, after {size} bytes. Copy or write it again"
        file.seek(8)
        try:
            entries = json.loads(file.read(header_length))
            ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
            expected = 8 + header_length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return "whose header is damaged"
    if size < expected:
        return f"which is incomplete: it has {size} of {expected} bytes. Copy or write it again"
    return f"which is damaged: it has {size} bytes where its header speaks of {expected}"


def _checked_header(name: str, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get(_HEADER_KEY)
    if text is None:
        raise ValueError(
            f"MemoryBank.load: expected path to be a file of patchcore_ext, got {name!r}, a safetensors file of something else "
            f"(no {_HEADER_KEY!r} in its header)."
        )
    damaged = ValueError(f"MemoryBank.load: expected path to be a file of patchcore_ext, got {name!r}, whose {_HEADER_KEY!r} header is damaged.")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged from error
    if not isinstance(header, dict) or not isinstance(header.get("format_version"), int):
        raise damaged
    if header["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"MemoryBank.load: expected path to be of format version {FORMAT_VERSION} or older, got {name!r} of version "
            f"{header['format_version']}: it was written by a newer patchcore_ext; upgrade this one."
        )
    names = header.get("image_names")
    if not isinstance(header.get("metadata"), dict) or not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
        raise damaged
    return header
