"""One coreset selection by one method, in a process of its own: ``python -m benchmarks.coreset_methods JSON`` prints what it took.

Runs in the environment of the method's package, so it imports patchcore_ext only for our own.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .harness import peak_memory_mb

_CACHE = Path(__file__).resolve().parents[1] / "build" / "benchmarks"


def ours(features: Tensor, picks: int, first: int) -> Tensor:
    """CoresetSampler, whole: rotation, packing and selection."""
    from patchcore_ext import CoresetSampler

    return CoresetSampler(num_samples=picks, projection_dim=None, start=first, progress=False).select(features).indices


def one_pass_a_pick(features: Tensor, picks: int, first: int) -> Tensor:
    """The canonical float64 loop: what the batched algorithm must equal."""
    from patchcore_ext import ops

    state = torch.full((len(features),), torch.inf, dtype=torch.float64)
    ops.add_picks(features, torch.tensor([first]), state)
    return torch.cat([torch.tensor([first]), ops.greedy_coreset(features, state, picks - 1)[0]])


def plain_loop(features: Tensor, picks: int, first: int) -> Tensor:
    """benchmarks/plain_loop.cpp: float32, AVX-512 where there is, huge pages, one thread."""
    library = _CACHE / "plain_loop.so"
    source = Path(__file__).with_name("plain_loop.cpp")
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        library.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["g++", "-O3", "-march=native", "-mprefer-vector-width=512", "-ffast-math", "-shared", "-fPIC", "-o", str(library), str(source)], check=True
        )
    indices = torch.empty(picks, dtype=torch.int64)
    count, dim = (ctypes.c_int64(size) for size in features.shape)
    ctypes.CDLL(str(library)).plain_loop(
        ctypes.c_void_p(features.data_ptr()), count, dim, ctypes.c_int64(first), ctypes.c_int64(picks), ctypes.c_void_p(indices.data_ptr())
    )
    return indices


def torch_difference(features: Tensor, picks: int, first: int) -> Tensor:
    """The textbook loop: the norm of the difference to the last pick."""
    smallest, indices = torch.full((len(features),), torch.inf), [first]
    for _ in range(picks - 1):
        smallest = torch.minimum(smallest, (features - features[indices[-1]]).square().sum(1))
        indices.append(int(smallest.argmax()))
    return torch.tensor(indices)


def torch_expanded(features: Tensor, picks: int, first: int) -> Tensor:
    """The same with |a|^2 + |b|^2 - 2ab, a matrix-vector product a pick: torch's fastest, and amazon's formula."""
    norms = features.square().sum(1)
    smallest, indices = torch.full((len(features),), torch.inf), [first]
    for _ in range(picks - 1):
        center = indices[-1]
        torch.minimum(smallest, norms + norms[center] - 2 * (features @ features[center]), out=smallest)
        indices.append(int(smallest.argmax()))
    return torch.tensor(indices)


def anomalib(features: Tensor, picks: int, first: int) -> Tensor:
    """Anomalib's KCenterGreedy without its projection, from a given start (its tests mock torch.randint the same way)."""
    from unittest import mock

    from anomalib.models.components.sampling import k_center_greedy

    sampler = k_center_greedy.KCenterGreedy(embedding=features, sampling_ratio=picks / len(features))
    sampler.features = features
    sampler.coreset_size = picks
    with (
        mock.patch.object(sampler.model, "fit"),
        mock.patch.object(sampler.model, "transform", return_value=features),
        mock.patch("torch.randint", return_value=torch.tensor(first)),
    ):
        return torch.tensor([int(index) for index in sampler.select_coreset_idxs()])


def fpsample(features: Tensor, picks: int, first: int) -> Tensor:
    """Fpsample's farthest point sampling."""
    import fpsample as package

    return torch.from_numpy(package.fps_sampling(features.numpy(), picks, start_idx=first).astype(np.int64))


METHODS = {function.__name__: function for function in (ours, one_pass_a_pick, plain_loop, torch_difference, torch_expanded, anomalib, fpsample)}


def main() -> None:
    """Loads the features, warms up on a few rows, selects ``repeats`` times, and prints JSON."""
    arguments: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(arguments["threads"])
    features = torch.from_numpy(np.load(arguments["features"]))
    method = METHODS[arguments["method"]]
    method(features[:4096].clone(), 40, 0)
    loaded = peak_memory_mb()
    seconds, indices = [], torch.empty(0)
    for _ in range(arguments.get("repeats", 1)):
        started = time.perf_counter()
        indices = method(features, arguments["picks"], arguments["first"])
        seconds.append(time.perf_counter() - started)
    peak = peak_memory_mb()
    if arguments.get("save"):
        np.save(arguments["save"], indices.numpy())
    print(json.dumps({"seconds": seconds, "extra_mb": peak - loaded}))


if __name__ == "__main__":
    main()
