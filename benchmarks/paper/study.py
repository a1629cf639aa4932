"""Runs rows: features from kept maps, scores by the row's method, metrics by the protocol of patchcore_ext.evaluation; what is finished is taken over."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from tqdm import tqdm

import patchcore_ext
from patchcore_ext.evaluation import ClassResult, measure
from patchcore_ext.layout import DatasetClass
from patchcore_ext.memory_bank import atomic_write
from patchcore_ext.patchcore import Prediction
from patchcore_ext.scoring import anomaly_maps

from .backbones import Backbones, UnavailableError, layer_names
from .datasets import Dataset
from .maps import MapStore, digest_of, file_digest
from .methods import METHODS, Case, Scored
from .patches import Patches
from .rows import BASE, Row

_RESULTS_VERSION = 1  # of what rows compute; a new one makes all of them again
_TIMED_IMAGES = 8


@dataclass
class Study:
    """One data set, one base backbone.

    Attributes:
        dataset: with its protocol.
        backbones: where weights are.
        base: the network of rows that name none.
        out: folder of the cache and of finished rows.
        aggregation: "concat" or "paper", of all rows.
        progress: show bars; None: on a terminal.
        only_finished: run nothing; rows that are not finished say so.
    """

    dataset: Dataset
    backbones: Backbones
    base: str
    out: Path
    aggregation: str = "concat"
    progress: bool | None = None
    only_finished: bool = False
    _stores: dict[tuple[str, int | None], MapStore] = field(default_factory=dict)
    _scored: dict[str, Scored] = field(default_factory=dict)

    def run(self, rows: Sequence[Row], seeds: int) -> dict[str, Any]:
        """All rows: by name, the runs (one for each seed: by class, metrics, facts and seconds), or why there are none."""
        results: dict[str, Any] = {}
        with tqdm(rows, unit="row", disable=None if self.progress is None else not self.progress) as bar:
            for row in bar:
                bar.set_description(row.name)
                try:
                    runs = [self.run_row(row, seed) for seed in range(seeds if row.seeded else 1)]
                    results[row.name] = {"runs": runs, "backbone": self._name(row.backbone) if not row.members else [self._name(name) for name in row.members]}
                except UnavailableError as error:
                    results[row.name] = {"unavailable": str(error)}
        return results

    def run_row(self, row: Row, seed: int) -> dict[str, Any]:
        """One row with one seed: by class, metrics, facts and seconds.

        Raises:
            UnavailableError: what the row needs is not here.
        """
        if row.variant is not None and row.variant not in self.dataset.variants:
            raise UnavailableError(f"{self.dataset.title}: no split {row.variant!r} beside the protocol's")
        classes = self.dataset.classes if row.variant is None else self.dataset.variants[row.variant]
        return {item.name: self._finished_or_run(row, item, seed) for item in classes}

    def case(self, row: Row, item: DatasetClass, seed: int) -> Case:
        """A row for a class, its features prepared."""
        train = tuple(item.train)
        if row.shots is not None:
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
            train = tuple(train[index] for index in order[: row.shots])
        if row.members:
            members = tuple(self.case(replace(row, method="patchcore", backbone=name, members=()), item, seed) for name in row.members)
            return replace(members[0], row=row, members=members)
        store, layers = self._store(row), self._layers(row)
        store.prepare((*train, *(image.path for image in item.test)), layers)
        broken = [path for path in train if path in store.unreadable]
        if broken:
            raise ValueError(f"paper: expected nominal images that can be read, got: {store.unreadable[broken[0]]}")
        test = tuple(image.path for image in item.test if image.path not in store.unreadable)
        options = {"patch_size": row.patch_size, "stride": row.stride, "aggregation": self.aggregation}
        size = store.transform.window(256, 256).size
        patches = [Patches(store, paths, layers, **options) for paths in (train, test)]  # type: ignore[arg-type]
        return Case(row, seed, patches[0], patches[1], size, self.out / "cache", row.pixels or self.dataset.measures_pixels, scored=self._scored)

    def forward_seconds(self, row: Row, paths: Sequence[str]) -> float:
        """Seconds from an image file to its patch features, the median of a few images, one at a time."""
        if row.members:
            return sum(self.forward_seconds(replace(row, backbone=name, members=()), paths) for name in row.members)
        extractor = self.backbones.extractor(self._name(row.backbone), self._layers(row))
        extractor.patch_size, extractor.stride, extractor.aggregation = row.patch_size, row.stride, self.aggregation
        transform = self.dataset.transform(row.size)
        seconds = []
        for path in paths[: _TIMED_IMAGES + 1]:
            started = time.perf_counter()
            with torch.inference_mode(), PIL.Image.open(path) as opened:
                extractor(transform(opened)[None])
            seconds.append(time.perf_counter() - started)
        return sorted(seconds[1:])[len(seconds[1:]) // 2]

    def _name(self, backbone: str) -> str:
        return self.base if backbone == BASE else backbone

    def _layers(self, row: Row) -> tuple[str, ...]:
        return layer_names(self._name(row.backbone), row.layers or self.dataset.layers)

    def _store(self, row: Row) -> MapStore:
        name = self._name(row.backbone)
        key = (name, row.size)
        if key not in self._stores:

            def make(layers: tuple[str, ...]) -> Any:
                return self.backbones.extractor(name, layers)

            self._stores[key] = MapStore(self.out / "cache" / "maps", make, self.dataset.transform(row.size), progress=self.progress is not False)
        return self._stores[key]

    def _finished_or_run(self, row: Row, item: DatasetClass, seed: int) -> dict[str, Any]:
        path = self.out / "rows" / row.name / f"{item.name}_{seed}.json"
        digest = self._digest(row, item, seed)
        try:
            stored: dict[str, Any] = json.loads(path.read_text(encoding="ascii"))
            if stored["digest"] == digest:
                return stored
        except (OSError, ValueError, KeyError):
            pass
        if self.only_finished:
            raise UnavailableError("not finished")
        case = self.case(row, item, seed)
        scored = METHODS[row.method](case)
        result = self._measured(case, item, scored)
        forward = self.forward_seconds(row, case.test.paths) if "times" in row.groups and seed == 0 else None
        entry = {"digest": digest, "result": result.to_dict(), "facts": scored.facts, "seconds": {**scored.seconds, "forward": forward}}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(entry)
        with atomic_write(path) as temporary:
            temporary.write_text(text + "\n", encoding="ascii")
        return dict(json.loads(text))  # as a later run reads it

    def _digest(self, row: Row, item: DatasetClass, seed: int) -> str:
        """A name for all that decides a row's result."""
        names = row.members or (row.backbone,)
        rows = [replace(row, backbone=name, members=()) for name in names]
        keys = [[self._store(part).key(layer) for layer in self._layers(part)] for part in rows]
        what = {key: value for key, value in asdict(row).items() if key not in ("name", "title", "groups")}
        files = [[file_digest(path), path] for path in item.train], [[file_digest(image.path), image.defect, image.mask] for image in item.test]
        versions = [_RESULTS_VERSION, patchcore_ext.__version__, "times" in row.groups]
        return digest_of([what, seed, keys, files, self.aggregation, self.dataset.measures_pixels, versions])

    def _measured(self, case: Case, item: DatasetClass, scored: Scored) -> ClassResult:
        store = case.test.store
        problems = tuple(store.unreadable[image.path] for image in item.test if image.path in store.unreadable)
        pixels = case.pixels and bool(scored.parts)
        made = predictions(case, scored, pixels)
        return measure(item, made, transform=store.transform, threshold=None, pixels=pixels, num_train=len(case.train.paths), problems=problems)


def predictions(case: Case, scored: Scored, with_maps: bool) -> Iterator[Prediction]:
    """One prediction an image; without maps theirs are empty."""
    transform = case.test.store.transform
    for index, path in enumerate(case.test.paths):
        anomaly_map = torch.empty(0, 0)
        if with_maps:
            with PIL.Image.open(path) as image:
                width, height = image.size
            maps = [anomaly_maps(distances[index : index + 1], grid, case.input_size)[0] for distances, grid in scored.parts]
            anomaly_map = transform.map_to_image(torch.stack(maps).mean(0), height, width)
        yield Prediction(path, float(scored.image_scores[index]), anomaly_map, False, float("inf"))
