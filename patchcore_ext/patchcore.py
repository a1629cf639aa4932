"""PatchCore as one object: fit on good images, score new ones, save and load (Roth et al. 2022, arXiv:2106.08265)."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks
from ._batch_size import choose_batch_size
from ._calibration import calibrate
from ._extraction import PatchBatch, extract_batches, gather_good_patches, resolve_device, resolve_source
from ._model_file import BackboneRecord, ModelRecord, no_warning_about_random_weights, read_model, restore_backbone, write_model
from .coreset import CoresetSampler
from .data import OnUnreadable, Source
from .features import FeatureExtractor
from .images import ImageTransform
from .layout import training_folder
from .memory_bank import MemoryBank
from .scoring import SCORES, PatchScorer, anomaly_maps
from .threshold import check_false_alarm_rate

__all__ = ["PatchCore", "Prediction"]

_log = logging.getLogger("patchcore_ext")


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the model says about one image.

    Attributes:
        path: the image's path, or "image <index>" where there is none.
        score: image anomaly score, Eq. (7), in units of feature distance (see ``score`` of PatchCore).
        anomaly_map: float32 [H, W] on the CPU, in the image's own pixels: distance of each place to the memory bank.
        is_anomalous: score > threshold.
        threshold: the threshold that was used.
    """

    path: str
    score: float
    anomaly_map: Tensor
    is_anomalous: bool
    threshold: float


@dataclass(frozen=True)
class _Fitted:
    """All that a fit makes. The model holds one of these or none, so an interrupted fit leaves the model as it was."""

    bank: MemoryBank
    scorer: PatchScorer
    threshold: float
    backbone_digest: str
    report: dict[str, Any]  # what is told about the fit in the model file; plain JSON values
    timings: dict[str, float]


class PatchCore:
    """Anomaly detection with a memory bank of patch features of good images.

    The road of the data: images -> features of a pretrained network (Eq. 1-3) -> coreset of the patch features (Eq. 5, Algorithm 1), the
    memory bank -> distance of each test patch to the bank (Eq. 6) -> image score (Eq. 7) and anomaly map.

    Args:
        backbone: name of a torchvision model, or a module of your own (used as it is, put into eval mode and moved to ``device``).
        layers: names of the modules inside the backbone whose outputs are used.
        weights: of a named backbone: a torchvision weights name, the path of a state dict (.pth, .safetensors), or None for random ones.
        coreset_ratio: share of the patch features that is kept, 0 < ratio <= 1.
        num_neighbors: b in Eq. (7).
        projection_dim: dimensions of the random projection the coreset is picked in; None: none; "auto": Johnson-Lindenstrauss.
        projection: "sparse" or "gaussian".
        aggregation: "concat" or "paper", see FeatureExtractor.
        patch_size: p of Eq. (1), odd.
        stride: s of Eq. (3).
        feature_dim: d of Eq. (2), for aggregation "paper".
        precision: "float32", or "bfloat16": a faster backbone, other features (by about 1%), see FeatureExtractor.
        compile: run the backbone through torch.compile, see FeatureExtractor; not kept in a model file.
        resize: (height, width) the images are stretched to, or an int for the short side, or None.
        crop: centre crop after the resize, or None. What lies outside a crop is never looked at; its map is 0.
        score: image score: "paper" (Eq. 7), "max", "anomalib" or "amazon", see PatchScorer.
        device: where the backbone runs: "auto" (CUDA if there is any), "cpu", "cuda", "cuda:1". The memory bank is on the CPU.
        seed: of the coreset's start and projection and of the choice of held-out images.
        batch_size: images that go through the backbone at once; None: 16, or as few as the free memory takes (an estimate: a quarter of it,
            divided by the pixels of the largest image and the bytes that the backbone's maps hold for each).
        num_workers: processes that load images; 0: the own one.

    Attributes:
        settings: dict of the arguments above that a model file keeps.
        extractor: the FeatureExtractor.
        transform: the ImageTransform.
        device: torch.device of the backbone.

    Raises:
        ValueError: an argument outside its range, an unknown layer or backbone, CUDA asked for where there is none.

    Example:
        >>> model = PatchCore(backbone="resnet18", layers=("layer2", "layer3"))  # doctest: +SKIP
        >>> for prediction in model.fit("bottle/train/good").predict("bottle/test"):  # doctest: +SKIP
        ...     print(prediction.path, prediction.score, prediction.is_anomalous)
    """

    def __init__(
        self,
        backbone: str | nn.Module = "wide_resnet50_2",
        layers: Sequence[str] = ("layer2", "layer3"),
        *,
        weights: str | os.PathLike[str] | None = "DEFAULT",
        coreset_ratio: float = 0.1,
        num_neighbors: int = 9,
        projection_dim: int | str | None = 128,
        projection: str = "sparse",
        aggregation: str = "concat",
        patch_size: int = 3,
        stride: int = 1,
        feature_dim: int = 1024,
        precision: str = "float32",
        compile: bool = False,
        resize: tuple[int, int] | int | None = (256, 256),
        crop: tuple[int, int] | int | None = None,
        score: str = "paper",
        device: str | torch.device = "auto",
        seed: int = 0,
        batch_size: int | None = None,
        num_workers: int = 0,
    ) -> None:
        self.device = resolve_device(device)
        self.transform = ImageTransform(resize=resize, crop=crop)
        self._num_workers = _checks.integer("PatchCore", "num_workers", num_workers, 0)
        self._fitted: _Fitted | None = None
        self.settings: dict[str, Any] = {
            "layers": list(layers),
            "coreset_ratio": coreset_ratio,
            "num_neighbors": _checks.integer("PatchCore", "num_neighbors", num_neighbors, 1),
            "projection_dim": projection_dim if isinstance(projection_dim, str | None) else int(projection_dim),
            "projection": projection,
            "aggregation": aggregation,
            "patch_size": patch_size,
            "stride": stride,
            "feature_dim": feature_dim,
            "precision": precision,
            "resize": self.transform.resize,
            "crop": self.transform.crop,
            "score": _checks.choice("PatchCore", "score", score, SCORES),
            "seed": _checks.integer("PatchCore", "seed", seed, 0, 2**64 - 1),
            "batch_size": None if batch_size is None else _checks.integer("PatchCore", "batch_size", batch_size, 1),
        }
        self._sampler(progress=False)  # checks its arguments now, not after the features are made
        self.extractor = FeatureExtractor(
            backbone,
            layers,
            weights=weights,
            aggregation=aggregation,
            patch_size=patch_size,
            stride=stride,
            feature_dim=feature_dim,
            precision=precision,
            compile=compile,
        ).to(self.device)

    def __repr__(self) -> str:
        state = f"{len(self.bank)} rows, threshold {self.threshold:.6g}" if self._fitted else "not fitted"
        return f"PatchCore({self.extractor.backbone_name}, layers={tuple(self.settings['layers'])}, {state})"

    @property
    def is_fitted(self) -> bool:
        """Whether there is a memory bank: after ``fit`` and ``load``."""
        return self._fitted is not None

    @property
    def bank(self) -> MemoryBank:
        """The memory bank, with the image and the patch position of each row."""
        return self._state().bank

    @property
    def threshold(self) -> float:
        """Images with a score above it are called anomalous; set by ``fit``, and may be set by hand."""
        return self._state().threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        self._fitted = replace(self._state(), threshold=_checked_threshold(value))

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of the last fit by stage: "features", "coreset", "threshold"; empty for a loaded model."""
        return dict(self._state().timings)

    @property
    def fit_report(self) -> dict[str, Any]:
        """How the fit came to its threshold: numbers of images, where the scores came from, the false alarm rate asked for and expected."""
        return dict(self._state().report)

    def fit(self, source: Source, *, false_alarm_rate: float = 0.01, progress: bool | None = None) -> PatchCore:
        """Makes the memory bank (Eq. 4, Algorithm 1) and the threshold from good images; returns self.

        A seeded tenth of the images, at least 8, is kept out of the bank; the threshold is the conformal quantile of their scores: on
        average a share of at most ``false_alarm_rate`` of good images of the same kind scores above it. Too few held-out images for the
        rate: the largest of their scores is taken. Fewer than 20 images: all go into the bank, and the scores are those of each image
        against the rows of the others. One image: the scores of each quarter of it against the other quarters, which is a guess. The log
        (logger "patchcore_ext") says which it was.

        Args:
            source: a folder, a list of paths, a Dataset, a DataLoader or a batch tensor [B, 3, H, W]. Of a folder in MVTec AD's layout the
                images in train/good are taken.
            false_alarm_rate: share of good images that may be called anomalous, between 0 and 1.
            progress: show progress bars; None: if stderr is a terminal.

        Returns:
            The model itself. Interrupted (Ctrl-C) or failed, it stays as it was before.

        Raises:
            ValueError: no images, an image that cannot be read, a rate outside (0, 1), or features that are not finite.
        """
        rate = check_false_alarm_rate(false_alarm_rate)
        started = perf_counter()
        if isinstance(source, str | os.PathLike):
            source = training_folder(os.fspath(source))
        good = gather_good_patches(self._batches(source, "features", progress), self.settings["seed"])
        features_done = perf_counter()
        num_images = len(good.names) + len(good.held_out)
        _log.info("Features of %d images: %d patches x %d, %.1f s.", num_images, *good.rows.shape, features_done - started)
        selection = self._sampler(progress).select(good.rows)
        origins = good.patch_origins[selection.indices]  # [M, 3]
        bank = MemoryBank(
            good.rows[selection.indices],
            image_indices=origins[:, 0].contiguous(),
            positions=origins[:, 1:].contiguous(),
            image_names=good.names,
        )
        coreset_done = perf_counter()
        _log.info("Coreset: %d patches kept, %.1f s.", len(bank), coreset_done - features_done)
        scorer = self._scorer(bank)
        threshold, report = calibrate(good, bank, self._scorer, rate)
        report["covering_curve"] = [list(point) for point in selection.covering_curve()] if self.settings["coreset_ratio"] < 1 else []
        timings = {
            "features": features_done - started,
            "coreset": coreset_done - features_done,
            "threshold": perf_counter() - coreset_done,
        }
        self._fitted = _Fitted(bank, scorer, threshold, self.extractor.digest(), report, timings)
        return self

    def predict(
        self, source: Source, *, threshold: float | None = None, progress: bool | None = None, on_unreadable: OnUnreadable | None = None
    ) -> Iterator[Prediction]:
        """Scores images, one after the other (Eq. 6, Eq. 7 and the anomaly map of section 3.3).

        Args:
            source: as for ``fit``.
            threshold: instead of the model's own.
            progress: show a progress bar; None: if stderr is a terminal.
            on_unreadable: called with path and error for each image file that cannot be read, which is then left out; None: the first
                such file ends the iteration with its error.

        Returns:
            An iterator of Prediction, in the order of the source; images are read as it advances.

        Raises:
            ValueError: at once, if the model is not fitted, there are no images or the threshold is not finite; while iterating, for an
                image that cannot be read.
        """
        state = self._state()
        limit = state.threshold if threshold is None else _checked_threshold(threshold)
        return self._predictions(self._batches(source, "predict", progress, on_unreadable), state.scorer, limit)

    def save(self, path: str | os.PathLike[str], include_backbone: bool = False) -> None:
        """Writes the model to one safetensors file: bank rows with provenance, settings, threshold, and name and digest of the backbone.

        Args:
            path: the file; written whole or not at all. The same model gives the same bytes.
            include_backbone: store the weights of the backbone too, so that ``load`` needs no other file (and no download).

        Raises:
            ValueError: the model is not fitted, or its backbone was changed after the fit.
            OSError: the file cannot be written.
        """
        state = self._state()
        record = ModelRecord(
            settings=self.settings,
            backbone=BackboneRecord(
                name=self.extractor.backbone_name,
                weights=self.extractor.weights_name,
                digest=state.backbone_digest,
                custom=self.extractor.is_custom,
                included=include_backbone,
            ),
            threshold=state.threshold,
            fit=state.report,
        )
        write_model(path, state.bank, record, self.extractor)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: str | torch.device = "auto",
        backbone: nn.Module | None = None,
        *,
        weights: str | os.PathLike[str] | None = None,
    ) -> PatchCore:
        """The model in a file written by ``save``.

        Args:
            path: the file.
            device: where the backbone runs, as for PatchCore.
            backbone: the module the model was fitted with, if it was a module of your own. If the file holds its weights, they are copied
                into this module.
            weights: where the weights of a torchvision backbone are now (name or state-dict file); None: where the file says.

        Returns:
            The fitted model.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is incomplete or no model, a backbone is needed, or the backbone's digest differs.
        """
        bank, record = read_model(path)
        source, source_weights = record.backbone.source(path, backbone, weights)
        try:
            with no_warning_about_random_weights(record.backbone.included):
                model = cls(source, weights=source_weights, device=device, **record.settings)
        except TypeError as error:
            raise ValueError(f"PatchCore.load: expected {os.fspath(path)!r} to hold settings that this version knows, got: {error}") from error
        restore_backbone(path, record.backbone, model.extractor)
        model._fitted = _Fitted(bank, model._scorer(bank), record.threshold, record.backbone.digest, record.fit, {})
        return model

    def _state(self) -> _Fitted:
        if self._fitted is None:
            raise ValueError("PatchCore: expected the model to be fitted first, got one without a memory bank; call fit() or PatchCore.load().")
        return self._fitted

    def _sampler(self, progress: bool | None) -> CoresetSampler:
        keys = ("projection_dim", "projection", "seed")
        return CoresetSampler(self.settings["coreset_ratio"], progress=progress, **{key: self.settings[key] for key in keys})

    def _scorer(self, bank: MemoryBank | Tensor) -> PatchScorer:
        return PatchScorer(bank, num_neighbors=self.settings["num_neighbors"], score=self.settings["score"])

    def _batches(self, source: Source, description: str, progress: bool | None, on_unreadable: OnUnreadable | None = None) -> Iterator[PatchBatch]:
        images = resolve_source(source)
        return extract_batches(
            images,
            self.extractor,
            self.transform,
            device=self.device,
            batch_size=self.settings["batch_size"] or choose_batch_size(self.extractor, self.transform, images, self.device),
            num_workers=self._num_workers,
            description=description,
            progress=progress,
            on_unreadable=on_unreadable,
        )

    def _predictions(self, batches: Iterator[PatchBatch], scorer: PatchScorer, threshold: float) -> Iterator[Prediction]:
        for batch in batches:
            # One image at a time: the scores are the same for any batch size, and Ctrl-C is heard in between.
            for path, (height, width), patches in zip(batch.paths, batch.sizes, batch.features.unbind(0), strict=True):
                scores = scorer(patches.unsqueeze(0))
                score = float(scores.image_scores[0])
                anomaly_map = anomaly_maps(scores.patch_distances, batch.grid, batch.input_size)[0]  # [h, w]
                yield Prediction(path, score, self.transform.map_to_image(anomaly_map, height, width), score > threshold, threshold)


def _checked_threshold(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"PatchCore: expected threshold to be a finite number, got {value}.")
    return float(value)
