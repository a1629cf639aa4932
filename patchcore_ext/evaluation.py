"""The protocol of Roth et al. 2022 (arXiv:2106.08265), section 4: for each class fit on good images, score the test images, compare with the truth."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._evaluation_results import ClassResult, EvaluationResult, ImageScore, printable, write_json
from ._measurement import Clock, measure
from ._results import MAP_FORMATS, ResultFolder
from ._version import __version__
from .layout import DatasetClass, LabelledImage, read_dataset
from .memory_bank import check_output_path
from .metrics import PixelMetrics
from .patchcore import PatchCore, Prediction
from .threshold import check_false_alarm_rate

__all__ = ["ClassResult", "EvaluationResult", "ImageScore", "evaluate", "measure"]

_log = logging.getLogger("patchcore_ext")
_RESULT = "result.json"
_SHOWN_METRICS = (("Image AUROC", "image_auroc"), ("Pixel AUROC", "pixel_auroc"), ("AUPRO", "aupro"))  # on the page of a class


def evaluate(
    model: PatchCore | Mapping[str, Any],
    root: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    save_maps: str | None = None,
    limit: float = 0.3,
    false_alarm_rate: float = 0.01,
    progress: bool | None = None,
) -> EvaluationResult:
    """Fits and tests each class of a dataset in MVTec AD's layout.

    Args:
        model: a PatchCore, or the keyword arguments of one. One that is fitted is only tested, on a dataset of one class. One that is not is
            fitted: the model itself if there is one class, a copy for each class if there are several.
        root: the folder of a class or of several, see read_dataset.
        output: folder for the results, made if it does not exist: results.json and results.csv, and for each class a folder with its heat
            maps, tables, page and result.json. A class whose result.json was made with the same settings from the same files (names and
            sizes) is taken over from there, so a run that was interrupted goes on where it was; such a class is not fitted again.
        save_maps: also write raw anomaly maps into the folder of each class: "npy", "tiff", "png" or None.
        limit: largest false positive rate of AUPRO.
        false_alarm_rate: of the model's own threshold, see PatchCore.fit.
        progress: show progress bars; None: if stderr is a terminal.

    Returns:
        The results; without the seconds, the same digits for the same data, settings, device and number of threads.

    Raises:
        ValueError: before anything is fitted: a folder that is no dataset, a class without test images or, unless the model is fitted,
            without images in train/good, several classes for a fitted model, an option out of range; later: a training image that cannot
            be read.
        OSError: the results cannot be written.

    Note:
        A test image or mask that cannot be read ends nothing: it is named in the log and in ``problems``, and left out of the metrics.
        Images with defects but without a mask are left out of the metrics of pixels. One anomaly map is held at a time. With a
        crop, the metrics of pixels are those of the part of the images inside it, as published figures are; ``problems`` tells how much of the
        images and of the marked defects lies outside, where nothing is found.

    Example:
        >>> model = PatchCore(backbone="resnet18", coreset_ratio=0.01)  # doctest: +SKIP
        >>> print(evaluate(model, "mvtec", output="results").table())  # doctest: +SKIP
    """
    classes = read_dataset(root)
    _check_classes(classes, isinstance(model, PatchCore) and model.is_fitted)
    _check_output(classes, output, save_maps)
    PixelMetrics(limit)  # refuses a limit out of range now, not after the fit
    options = _Options(save_maps, limit, check_false_alarm_rate(false_alarm_rate), progress)
    model = model if isinstance(model, PatchCore) else PatchCore(**model)
    if output is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
        check_output_path(Path(output) / "results.json")
    settings = _settings(model, options)
    results: dict[str, ClassResult] = {}
    for number, item in enumerate(classes, start=1):
        _log.info("Class %s (%d of %d): %d images to fit on, %d to test.", printable(item.name), number, len(classes), len(item.train), len(item.test))
        for problem in item.problems:
            _log.warning("%s: %s", printable(item.name), printable(problem))
        this = copy.copy(model) if len(classes) > 1 else model
        folder = None if output is None else Path(output) / item.name
        results[item.name] = _evaluate_or_take_over(this, item, folder, options, settings)
    result = EvaluationResult(results, settings)
    if output is not None:
        result.save(output)
    return result


@dataclass(frozen=True)
class _Options:
    """Arguments of evaluate that each class needs."""

    save_maps: str | None
    limit: float
    false_alarm_rate: float
    progress: bool | None


def _check_classes(classes: Sequence[DatasetClass], is_fitted: bool) -> None:
    for item in classes:
        if not item.test:
            raise ValueError(f"evaluate: expected images in test/<defect> and test/good of class {item.name!r}, got none.")
        if not item.train and not is_fitted:
            raise ValueError(f"evaluate: expected images in train/good of class {item.name!r}, got none; or pass a model that is fitted.")
    if is_fitted and len(classes) > 1:
        raise ValueError(f"evaluate: expected a dataset of one class for a model that is fitted, got {len(classes)} classes; pass one of their folders.")


def _check_output(classes: Sequence[DatasetClass], output: str | os.PathLike[str] | None, save_maps: str | None) -> None:
    if save_maps is not None and (save_maps not in MAP_FORMATS or output is None):
        raise ValueError(f"evaluate: expected save_maps to be one of {MAP_FORMATS} with an output folder, got {save_maps!r} and output {output!r}.")
    if output is None:
        return
    below = os.path.join(os.path.realpath(output), "")
    inside = next((path for item in classes for path in (*item.train, *(image.path for image in item.test)) if os.path.realpath(path).startswith(below)), None)
    if inside is not None:
        raise ValueError(f"evaluate: expected the output folder to hold no image of the dataset, got {os.fspath(output)!r} with {inside!r} in it.")
    if os.path.exists(output) and not os.path.isdir(output):
        raise NotADirectoryError(f"Cannot write results into {os.fspath(output)!r}: that is a file; give the name of a folder.")


def _settings(model: PatchCore, options: _Options) -> dict[str, Any]:
    """All that decides the results beside the files; plain JSON values."""
    settings = {
        "backbone": model.extractor.backbone_name,
        "weights": model.extractor.weights_name,
        "backbone_digest": model.extractor.digest(),
        **model.settings,
        "device": model.device.type,
        "false_alarm_rate": model.fit_report.get("false_alarm_rate") if model.is_fitted else options.false_alarm_rate,
        "limit": options.limit,
        "version": __version__,
        "torch": torch.__version__,
        "bank_digest": _bank_digest(model) if model.is_fitted else None,
    }
    return dict(json.loads(json.dumps(settings, default=str)))


def _bank_digest(model: PatchCore) -> str:
    digest = hashlib.sha256(f"{model.threshold!r} {model.bank.features.dtype} {list(model.bank.features.shape)}".encode())
    digest.update(model.bank.features.cpu().contiguous().view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _digest(settings: Mapping[str, Any], save_maps: str | None, item: DatasetClass) -> str:
    masks = [image.mask for image in item.test if image.mask is not None]
    files = [(path, os.path.getsize(path) if os.path.exists(path) else None) for path in (*item.train, *(image.path for image in item.test), *masks)]
    text = json.dumps({"settings": settings, "save_maps": save_maps, "files": files}, sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode('ascii')).hexdigest()}"


def _evaluate_or_take_over(model: PatchCore, item: DatasetClass, folder: Path | None, options: _Options, settings: Mapping[str, Any]) -> ClassResult:
    if folder is None:
        return _evaluate_class(model, item, None, options)
    digest = _digest(settings, options.save_maps, item)
    result = _finished(folder, digest)
    if result is None:
        result = _evaluate_class(model, item, folder, options)
        write_json(folder / _RESULT, {"digest": digest, "result": result.to_dict()})
    return result


def _finished(folder: Path, digest: str) -> ClassResult | None:
    """The result of an earlier run with the same digest."""
    try:
        stored = json.loads((folder / _RESULT).read_text(encoding="ascii"))
        result = ClassResult.from_dict(stored["result"]) if stored["digest"] == digest else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        _log.warning("%s: cannot be used and is made again (%s).", folder / _RESULT, type(error).__name__)
        return None
    if result is None:
        _log.info("%s was made with other settings or files and is made again.", folder / _RESULT)
    else:
        _log.info("Taken over from %s: same settings, same files.", folder / _RESULT)
    return result


def _evaluate_class(model: PatchCore, item: DatasetClass, folder: Path | None, options: _Options) -> ClassResult:
    clock = Clock()
    if not model.is_fitted:
        model.fit(item.train, false_alarm_rate=options.false_alarm_rate, progress=options.progress)
        clock.seconds.update(model.timings)
    paths = [image.path for image in item.test]
    files = None if folder is None else ResultFolder(folder, paths, threshold=model.threshold, color_scale=model.threshold, save_maps=options.save_maps)
    problems = []

    def leave_out(path: str, error: ValueError) -> None:
        _log.warning("Left out: %s", printable(str(error)))
        problems.append(str(error))

    def write(image: LabelledImage, prediction: Prediction, mask: Tensor | None) -> None:
        if files is not None:
            files.add(prediction, defect=image.defect, is_defective=image.is_defective, mask=None if mask is None else mask.numpy())

    result = measure(
        item,
        clock.timed("predict", model.predict(paths, progress=options.progress, on_unreadable=leave_out)),
        transform=model.transform,
        threshold=model.threshold,
        limit=options.limit,
        num_train=model.fit_report.get("num_images"),
        problems=problems,
        on_image=None if files is None else write,
        clock=clock,
    )
    if files is not None:
        with clock("files"):
            summary = {"Threshold": f"{model.threshold:.6g}", "Backbone": model.extractor.backbone_name, "Left out": str(result.num_unreadable)}
            shown = {name: getattr(result, key) for name, key in _SHOWN_METRICS}
            files.finish(item.name, summary, model.fit_report.get("covering_curve", []), shown)
    return result
