"""How each method of a row scores the test images of a class; all of them see the same features."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchcore_ext import CoresetSampler, PatchScorer, ops
from patchcore_ext.memory_bank import atomic_write
from patchcore_ext.scoring import anomaly_maps

from ..rivals import ivfpq, padim, samplers, spade
from .backbones import UnavailableError
from .maps import digest_of
from .patches import Patches
from .rows import Row

PADIM_CHANNELS = {448: 100, 1792: 550}  # of ResNet18 and WideResNet50, as in the rival's paper; else a third
NORMALISING_IMAGES = 64
_GALLERY_BYTES = 2 << 30


@dataclass(frozen=True)
class Case:
    """One class, one row and one seed.

    Attributes:
        row: what to do.
        seed: of samplers.
        train: patches of the nominal images.
        test: patches of the test images.
        input_size: (height, width) that the network saw.
        cache: a folder for picks.
        pixels: whether anomaly maps are wanted; some methods save work without.
        members: of an ensemble, a case for each backbone.
        scored: what rows of several tables, and ensembles, share: by what decides it.
    """

    row: Row
    seed: int
    train: Patches
    test: Patches
    input_size: tuple[int, int]
    cache: Path
    pixels: bool
    members: tuple[Case, ...] = ()
    scored: dict[str, Scored] = field(default_factory=dict)

    @property
    def num_patches(self) -> int:
        """Of an image."""
        rows, columns = self.train.grid()
        return rows * columns


@dataclass
class Scored:
    """What a method says.

    Attributes:
        image_scores: float64 [T].
        parts: patch distances [T, P] with their grid; the anomaly map is the mean of the maps of the parts. Empty: no maps.
        facts: about the bank, plain JSON values.
        seconds: "fit", and "score" for all test images without their maps.
    """

    image_scores: Tensor
    parts: list[tuple[Tensor, tuple[int, int]]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def greedy_picks(case: Case, ratio: float) -> Tensor:
    """Rows of the greedy coreset, kept on disk: a smaller coreset is the beginning of a larger one of the same seed."""
    count = max(1, int(ratio * len(case.train.paths) * case.num_patches))
    path = case.cache / "picks" / f"{digest_of([case.train.key(), case.seed])}.npy"
    kept = torch.from_numpy(np.load(path)) if path.exists() else None
    if kept is not None and len(kept) >= count:
        return kept[:count]
    sampler = CoresetSampler(num_samples=count, projection_dim=None, seed=case.seed)
    picks = sampler.select(case.train.projected(case.seed), initial_indices=kept).indices
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.save(file, picks.numpy())
    return picks


def _picked_rows(case: Case) -> Tensor | None:
    """Numbers of the rows in the bank; None: all of them."""
    num_rows = len(case.train.paths) * case.num_patches
    if case.row.ratio == 1:
        return None
    if case.row.method == "patchcore":
        return greedy_picks(case, case.row.ratio)
    return samplers.random_rows(num_rows, max(1, int(case.row.ratio * num_rows)), case.seed)


def score_patches(bank: Tensor, test: Patches) -> Scored:
    """PatchCore's scores, Eq. (6) and (7), with this bank."""
    scorer = PatchScorer(bank)
    scores, distances, used, seconds = [], [], torch.zeros(len(bank), dtype=torch.bool), 0.0
    for chunk in test.chunks():
        started = time.perf_counter()
        found = scorer(chunk)
        seconds += time.perf_counter() - started
        scores.append(found.image_scores.double())
        distances.append(found.patch_distances)
        used[found.nearest_indices.flatten()] = True
    facts = {"bank_rows": len(bank), "dim": bank.shape[1], "share_in_use": float(used.double().mean())}
    return Scored(torch.cat(scores), [(torch.cat(distances), test.grid())], facts, {"score": seconds})


def patchcore(case: Case) -> Scored:
    """PatchCore with the bank of a sampler: greedy, random, or none (ratio 1)."""
    key = digest_of([case.row.method, case.row.ratio, case.seed, case.train.key(), case.test.key()])
    if key not in case.scored:
        started = time.perf_counter()
        bank = case.train.rows(_picked_rows(case))
        fit = time.perf_counter() - started
        scored = score_patches(bank, case.test)
        scored.seconds["fit"] = fit
        if case.row.shots is not None:  # no other row asks for these
            return scored
        case.scored[key] = scored
    return case.scored[key]


def proxies(case: Case) -> Scored:
    """PatchCore with learned proxies for a bank."""
    started = time.perf_counter()
    picks = _picked_rows(case)
    assert picks is not None
    bank = samplers.learned_proxies(case.train.rows(), picks, seed=case.seed, **case.row.options)
    fit = time.perf_counter() - started
    scored = score_patches(bank, case.test)
    scored.seconds["fit"] = fit
    return scored


def approximate(case: Case) -> Scored:
    """Distances of a quantised index; the weight of Eq. (7) from the exact bank."""
    started = time.perf_counter()
    bank = case.train.rows(_picked_rows(case))
    try:
        index = ivfpq.build_index(bank)
    except ModuleNotFoundError as error:
        raise UnavailableError("faiss is not installed (pip install faiss-cpu)") from error
    codes = ops.prepare_bank(bank)
    fit = time.perf_counter() - started
    scores, distances, seconds = [], [], 0.0
    for chunk in case.test.chunks():
        started = time.perf_counter()
        queries = chunk.flatten(0, 1)
        found, nearest = ivfpq.search(index, queries, 1)
        found, nearest = found.view(chunk.shape[:2]), nearest.clamp(min=0).view(chunk.shape[:2])
        scores.append(ops.image_scores(found.double().square(), nearest, queries, bank, 9, codes).double())
        seconds += time.perf_counter() - started
        distances.append(found)
    return Scored(torch.cat(scores), [(torch.cat(distances), case.test.grid())], {"bank_rows": len(bank)}, {"fit": fit, "score": seconds})


def run_spade(case: Case) -> Scored:
    """SPADE: the mean of the last layer for the image, the pyramid for pixels."""
    started = time.perf_counter()
    train_means, test_means = case.train.means(), case.test.means()
    scores, nearest = spade.image_neighbors(train_means, test_means)
    parts = []
    if case.pixels:
        gallery = _gallery(case)
        images = (patches for chunk in case.test.chunks() for patches in chunk)
        found = [spade.pixel_distances(patches, numbers, gallery) for patches, numbers in zip(images, nearest, strict=True)]
        parts = [(torch.stack(found), case.test.grid())]
    return Scored(scores.double(), parts, {"neighbors": nearest.shape[1]}, {"score": time.perf_counter() - started})


def _gallery(case: Case) -> Callable[[Tensor], Tensor]:
    """Patches of training images: in memory where they fit."""
    dim = next(case.train.made()).shape[2]
    if 4 * len(case.train.paths) * case.num_patches * dim <= _GALLERY_BYTES:
        return spade.Gallery(case.train.rows(), case.num_patches)

    def read(images: Tensor) -> Tensor:
        return replace(case.train, paths=tuple(case.train.paths[index] for index in images)).rows()

    return read


def run_padim(case: Case) -> Scored:
    """PaDiM; the image's score is the largest value of its map."""
    started = time.perf_counter()
    dim = next(case.train.made()).shape[2]
    channels = padim.drawn_channels(dim, PADIM_CHANNELS.get(dim, max(1, dim // 3)), case.seed)
    found = padim.distances(case.train.made, case.test.chunks, channels)
    grid = case.test.grid()
    scores = [float(anomaly_maps(row[None], grid, case.input_size).max()) for row in found]
    facts = {"channels": len(channels)}
    return Scored(torch.tensor(scores, dtype=torch.float64), [(found, grid)], facts, {"score": time.perf_counter() - started})


def ensemble(case: Case) -> Scored:
    """The mean of the members' scores and maps, each brought to mean 0 and deviation 1 of nominal images, or (option) to 0..1 of the test images."""
    scored = [patchcore(member) for member in case.members]
    seconds = {stage: sum(part.seconds[stage] for part in scored) for stage in ("fit", "score")}
    scores, parts = [], []
    for member, found in zip(case.members, scored, strict=True):
        distances, grid = found.parts[0]
        if case.row.options.get("normalisation") == "test min-max":
            (low, span), (map_low, map_span) = ((float(v.min()), float(v.max() - v.min())) for v in (found.image_scores, distances))
        else:
            (low, span), (map_low, map_span) = nominal_statistics(member)
        scores.append((found.image_scores - low) / span)
        parts.append(((distances - map_low) / map_span, grid))
    facts = {"members": [member.row.backbone for member in case.members], "normalisation": case.row.options.get("normalisation", "nominal images")}
    return Scored(torch.stack(scores).mean(0), parts, facts, seconds)


def nominal_statistics(case: Case) -> tuple[tuple[float, float], tuple[float, float]]:
    """Mean and deviation of image scores, and of patch distances, of nominal images against the bank rows of all the others; at most 64 images."""
    picks = _picked_rows(case)
    bank = case.train.rows(picks)
    owners = (torch.arange(len(bank)) if picks is None else picks) // case.num_patches
    count = len(case.train.paths)
    scores, distances = [], []
    for image in sorted({i * count // min(count, NORMALISING_IMAGES) for i in range(min(count, NORMALISING_IMAGES))}):
        others = bank[owners != image]
        if len(others):
            found = PatchScorer(others)(case.train.rows(torch.arange(case.num_patches) + image * case.num_patches))
            scores.append(float(found.image_scores[0]))
            distances.append(found.patch_distances.double())
    if len(scores) < 2:
        raise UnavailableError("an ensemble needs at least two nominal images")
    every = torch.cat([part.flatten() for part in distances])
    return (float(np.mean(scores)), float(np.std(scores)) or 1.0), (float(every.mean()), float(every.std()) or 1.0)


METHODS: dict[str, Callable[[Case], Scored]] = {
    "patchcore": patchcore,
    "random": patchcore,
    "proxies": proxies,
    "ivfpq": approximate,
    "spade": run_spade,
    "padim": run_padim,
    "ensemble": ensemble,
}
