"""The maps of a network's layers, kept on disk by the content of network and image; they serve every patch size, stride and union of hierarchies.

Each batch goes through the network on one thread, and batches are spread over threads: a map has the same bits whatever the number of threads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from patchcore_ext.features import FeatureExtractor
from patchcore_ext.images import ImageTransform, load_image
from patchcore_ext.memory_bank import atomic_write

_BATCH, _BATCH_PIXELS = 4, 8 * 224 * 224  # of images that go through the network together: more leave the cache (448 px: two take 0.81 of the time of eight)


def digest_of(value: Any) -> str:
    """A name for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


@cache
def file_digest(path: str) -> str:
    """A name for a file's content."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:32]


class MapStore:
    """Maps of images, made when they are first wanted.

    Args:
        folder: of the cache; safe to delete.
        make_extractor: gives the network for names of layers.
        transform: what images go through.
        progress: show a bar.

    Attributes:
        unreadable: why, of each image that cannot be read.
    """

    def __init__(self, folder: Path, make_extractor: Callable[[tuple[str, ...]], FeatureExtractor], transform: ImageTransform, progress: bool = True) -> None:
        self.transform = transform
        self.unreadable: dict[str, str] = {}
        self._folder = folder
        self._make_extractor = make_extractor
        self._progress = progress
        self._keys: dict[str, str] = {}

    def key(self, layer: str) -> str:
        """A name for all that decides a layer's map but the image: weights up to the layer, transform, and torch with its instruction set."""
        if layer not in self._keys:
            extractor = self._make_extractor((layer,))
            told = [extractor.digest(), layer, self.transform.to_dict(), torch.__version__, torch.backends.cpu.get_cpu_capability()]
            self._keys[layer] = digest_of([extractor.backbone_name, *told])
        return self._keys[layer]

    def prepare(self, paths: Iterable[str], layers: Sequence[str]) -> None:
        """Makes what is missing; interrupted, it goes on from there the next time."""
        missing = [path for path in dict.fromkeys(paths) if path not in self.unreadable and not all(self._file(path, layer).exists() for layer in layers)]
        layers = [layer for layer in layers if not all(self._file(path, layer).exists() for path in missing)]
        if not layers:
            return
        extractor = self._make_extractor(tuple(layers))
        for layer in layers:
            (self._folder / self.key(layer)).mkdir(parents=True, exist_ok=True)

        def work(part: list[str]) -> None:
            torch.set_num_threads(1)
            images = {path: image for path in part if (image := self._read(path)) is not None}
            if not images:
                return
            with torch.inference_mode():
                maps = extractor.maps(torch.stack(list(images.values())))
            for layer, values in maps.items():
                for path, value in zip(images, values, strict=True):
                    with atomic_write(self._file(path, layer)) as temporary, open(temporary, "wb") as file:
                        np.save(file, value.contiguous().numpy())

        height, width = self.transform.window(256, 256).size
        batch = min(_BATCH, max(2, _BATCH_PIXELS // (height * width)))
        parts = [missing[start : start + batch] for start in range(0, len(missing), batch)]
        with tqdm(total=len(missing), desc=f"{extractor.backbone_name} {'+'.join(layers)}", unit="image", disable=None if self._progress else True) as bar:
            for index in in_threads(work, parts):
                bar.update(len(parts[index]))

    def load(self, path: str, layers: Sequence[str]) -> list[Tensor]:
        """Maps [C, h, w] of the layers of one image that was prepared."""
        return [torch.from_numpy(np.load(self._file(path, layer))) for layer in layers]

    def _file(self, path: str, layer: str) -> Path:
        return self._folder / self.key(layer) / f"{file_digest(path)}.npy"

    def _read(self, path: str) -> Tensor | None:
        try:
            return self.transform(load_image(path))
        except ValueError as error:
            self.unreadable[path] = str(error)
            return None


def in_threads(work: Callable[[Any], None], parts: Sequence[Any]) -> Iterator[int]:
    """Calls ``work`` on all parts, as many at a time as torch has threads; yields the numbers of those that are done; after an error no more begin."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        waiting = iter(enumerate(parts))
        running: dict[Future[None], int] = {pool.submit(work, part): index for index, part in islice(waiting, 2 * torch.get_num_threads())}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                yield running.pop(future)
                for index, part in islice(waiting, 1):
                    running[pool.submit(work, part)] = index
