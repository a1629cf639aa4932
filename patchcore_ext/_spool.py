"""More values than memory: blocks in an anonymous temporary file."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Spool:
    """Values in blocks of at most ``capacity``: one block in memory, those before it in a temporary file without a name, which goes with the spool.

    Args:
        dtype: of the values.
        capacity: most values in memory, and in a block.
        arrange: sorts a block, or the like, in place; called before a block is read, and again only when values were added to it.

    Attributes:
        count: number of values so far.
    """

    def __init__(self, dtype: np.dtype[Any], capacity: int, arrange: Callable[[Array], None]) -> None:
        self.count = 0
        self._buffer = np.empty(capacity, dtype)  # the system gives it pages as they are written
        self._filled = 0
        self._arrange = arrange
        self._arranged = False  # the block in memory
        self._file: Any = None
        self._lengths: list[int] = []  # of the blocks in the file

    def append(self, values: Array) -> None:
        """Adds values [n], which are copied."""
        self.count += len(values)
        while len(values) > 0:
            if self._filled == len(self._buffer):
                self._write_block()
            part = values[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            self._arranged = False
            values = values[len(part) :]

    def blocks(self) -> Iterator[Array]:
        """All blocks; each is valid until the next is asked for."""
        if self._file is None:
            yield self._arranged_buffer()
            return
        if self._filled > 0:
            self._write_block()  # the buffer is needed for reading
        self._file.seek(0)
        for length in self._lengths:
            block = self._buffer[:length]
            if self._file.readinto(block.view(np.uint8)) != block.nbytes:
                raise OSError("Spool: the temporary file ended early.")
            yield block

    def _write_block(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the spool
            weakref.finalize(self, self._file.close)
        block = self._arranged_buffer()
        self._file.seek(sum(self._lengths) * block.itemsize)
        self._file.write(block.view(np.uint8))
        self._lengths.append(self._filled)
        self._filled = 0

    def _arranged_buffer(self) -> Array:
        block = self._buffer[: self._filled]
        if not self._arranged:
            self._arrange(block)
            self._arranged = True
        return block
