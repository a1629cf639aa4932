"""Input checks shared by the ops and the classes above them: every error names the argument, what was expected and what came."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import _library

FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ERROR_MARK = "patchcore_ext: "  # csrc/bindings/torch_compat.h

ArrayLike = Tensor | npt.NDArray[Any]
Numbers = ArrayLike | Sequence[float]


def describe(value: object) -> str:
    """A short description of a value for an error message: dtype and shape of tensors, the value itself when it is small."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 60 else type(value).__name__


def features(op: str, argument: str, value: ArrayLike, *, ndim: int = 2) -> Tensor:
    """``value`` as a tensor of feature rows that the kernels take.

    NumPy arrays share their memory when they can. float64 is rounded to float32 with a warning: the kernels' exactness starts at float32 features.

    Args:
        op: The op or class that asks, for the message.
        argument: The argument's name, for the message.
        value: ``[..., D]`` with ``ndim`` dimensions, float32, float16, bfloat16 or float64, tensor or NumPy array, D >= 1.
        ndim: Number of dimensions wanted.

    Returns:
        A float32, float16 or bfloat16 tensor of the same shape, detached.

    Raises:
        TypeError: Not a tensor or array, or of another dtype.
        ValueError: Wrong number of dimensions, D = 0, or a device without kernels.
    """
    if isinstance(value, np.ndarray):
        value = _tensor_from_numpy(op, argument, value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: expected {argument} to be a torch.Tensor or numpy.ndarray, got {describe(value)}.")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: expected {argument} to be a dense tensor, got layout {value.layout}; call .to_dense().")
    if value.dtype == torch.float64:
        warnings.warn(f"{op}: {argument} is float64 and is rounded to float32; pass float32 to silence this.", UserWarning, stacklevel=4)
        value = value.float()
    if value.dtype not in FEATURE_DTYPES:
        raise TypeError(f"{op}: expected {argument} to be float32, float16 or bfloat16, got {describe(value)}.")
    if value.ndim != ndim or value.shape[-1] < 1:
        wanted = "[rows, dim]" if ndim == 2 else f"{ndim}-dimensional"
        raise ValueError(f"{op}: expected {argument} to be {wanted} with dim >= 1, got {describe(value)}.")
    on_device(op, argument, value)
    return value


def _tensor_from_numpy(op: str, argument: str, array: npt.NDArray[Any]) -> Tensor:
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise TypeError(f"{op}: expected {argument} to be float32 or float16, got {describe(array)}; call .astype(numpy.float32).")
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if not native.flags.writeable or any(stride < 0 for stride in native.strides):
        native = native.copy()  # torch shares memory only with writable arrays of non-negative strides
    return torch.from_numpy(native)


def on_device(op: str, argument: str, value: Tensor) -> None:
    """ValueError when there are no kernels for the tensor's device."""
    if value.device.type == "meta" or torch.compiler.is_compiling():
        return
    problem = _library.kernel_problem(value.device)
    if problem is not None:
        raise ValueError(f"{op}: expected {argument} to be on a device with kernels, got {value.device}: {problem}.")


def same_dim(op: str, argument: str, value: Tensor, other_argument: str, other: Tensor) -> None:
    """ValueError when the last dimensions differ."""
    if value.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"{op}: expected {argument} to have the dimension of {other_argument} ({other.shape[-1]}), got {value.shape[-1]}; were they extracted "
            "with the same backbone, layers and settings?"
        )


def integer(op: str, argument: str, value: object, low: int, high: int | None = None, high_meaning: str = "") -> int:
    """``value`` as an int in [low, high]; bool and float are refused."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{op}: expected {argument} to be an integer, got {describe(value)}.")
    number = int(value)
    if number < low or (high is not None and number > high):
        wanted = f"at least {low}" if high is None else f"between {low} and {high}{high_meaning}"
        raise ValueError(f"{op}: expected {argument} to be {wanted}, got {number}.")
    return number


def choice(op: str, argument: str, value: object, choices: tuple[str, ...]) -> str:
    """``value`` as one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{op}: expected {argument} to be one of {', '.join(map(repr, choices))}, got {value!r}.")
    return value


def numbers(op: str, argument: str, value: Numbers) -> npt.NDArray[Any]:
    """``value`` as an array of booleans, integers or floats on the CPU, of any shape; TypeError when it holds anything else."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        array = np.empty(0, object)
    if array.dtype.kind not in "buif":
        raise TypeError(f"{op}: expected {argument} to be numbers, got {describe(value)}.")
    return array


def finite(op: str, argument: str, values: npt.NDArray[Any]) -> None:
    """ValueError when there is NaN or infinity among the values."""
    wrong = values.size - int(np.count_nonzero(np.isfinite(values)))
    if wrong > 0:
        raise ValueError(f"{op}: expected {argument} to be finite, got NaN or infinity in {wrong} of {values.size} values.")


@contextlib.contextmanager
def native_errors(op: str | None = None) -> Iterator[None]:
    """Turns the kernels' own complaints (a RuntimeError with our mark) into ValueError with the sentence alone, in the name of ``op`` if given."""
    try:
        yield
    except RuntimeError as error:
        _, mark, sentence = str(error).partition(_ERROR_MARK)
        if not mark:
            raise
        line = sentence.split("\n", 1)[0]
        raise ValueError(line if op is None else f"{op}:{line.partition(':')[2]}") from None


def renamed(error: ValueError, op: str, was: str, now: str) -> ValueError:
    """A complaint of any op about its argument ``was`` as one of ``op`` about its argument ``now``; others as they are."""
    _, found, rest = str(error).partition(f": expected {was} ")
    return ValueError(f"{op}: expected {now} {rest}") if found else error
