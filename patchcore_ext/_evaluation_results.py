"""What an evaluation found: per image, per class and in all; as JSON, CSV and a table."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .memory_bank import atomic_write

_MEAN_OF = ("image_auroc", "pixel_auroc", "aupro", "f1", "misclassified", "errors_at_full_recall", "false_alarms", "misses")
# Heading, name in the results, and whether it is a fraction, which is shown in percent.
_COLUMNS = (
    ("image AUROC", "image_auroc", True),
    ("pixel AUROC", "pixel_auroc", True),
    ("AUPRO", "aupro", True),
    ("F1", "f1", True),
    ("misclassified", "misclassified", False),
    ("at full recall", "errors_at_full_recall", False),
    ("false alarms", "false_alarms", False),
    ("misses", "misses", False),
)
_UNDEFINED = "-"


@dataclass(frozen=True)
class ImageScore:
    """One test image.

    Attributes:
        path: its file.
        defect: the kind of defect, "good" for none.
        is_defective: the truth.
        score: image anomaly score; None if the file could not be read.
        is_anomalous: the verdict, score > threshold of the model; None if the file could not be read, or without a threshold.
    """

    path: str
    defect: str
    is_defective: bool
    score: float | None
    is_anomalous: bool | None


@dataclass(frozen=True)
class ClassResult:
    """The results of one class. Metrics are fractions of 1, counts are of images; None where a metric is undefined.

    Attributes:
        image_auroc: area under the ROC curve of the image scores.
        pixel_auroc: area under the ROC curve of all pixels, each image in its own pixels.
        aupro: area under the per-region overlap, see PixelMetrics.
        f1: the largest F1 that a threshold reaches. Found on the test labels: an upper bound of what is reached without them.
        f1_threshold: the threshold that reaches it.
        misclassified: images on the wrong side of ``f1_threshold``.
        errors_at_full_recall: false alarms at the largest threshold that misses no defect.
        threshold: the model's own, found without the test images; None for a method without one, and so are ``false_alarms`` and ``misses``.
        false_alarms: good images above ``threshold``.
        misses: images with defects that are not above ``threshold``.
        num_train: images the model was fitted on.
        num_good: good test images that were scored.
        num_defective: test images with defects that were scored.
        num_unreadable: test images that could not be read; they are left out of all metrics.
        problems: a sentence for each thing that is missing or wrong in the data.
        seconds: by stage: "features", "coreset" and "threshold" of the fit (absent if the model was fitted before), "predict", "metrics", and
            "files" if any were written.
        images: all test images, in the order of the dataset.
    """

    image_auroc: float | None
    pixel_auroc: float | None
    aupro: float | None
    f1: float | None
    f1_threshold: float | None
    misclassified: int | None
    errors_at_full_recall: int | None
    threshold: float | None
    false_alarms: int | None
    misses: int | None
    num_train: int
    num_good: int
    num_defective: int
    num_unreadable: int
    problems: tuple[str, ...]
    seconds: dict[str, float]
    images: tuple[ImageScore, ...]

    def to_dict(self) -> dict[str, Any]:
        """All attributes for JSON; `from_dict` takes them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClassResult:
        """The result that `to_dict` gave.

        Raises:
            TypeError, KeyError: attributes that are missing or unknown.
        """
        images = tuple(ImageScore(**image) for image in values["images"])
        return cls(**{**values, "images": images, "problems": tuple(values["problems"])})


@dataclass(frozen=True)
class EvaluationResult:
    """The results of a dataset.

    Attributes:
        classes: by name, in the order of the dataset.
        settings: the model's settings and what else decides the results.
    """

    classes: dict[str, ClassResult]
    settings: dict[str, Any]

    @property
    def mean(self) -> dict[str, float | None]:
        """The mean over the classes for which a metric is defined; None where it is for none."""
        means = {}
        for name in _MEAN_OF:
            values = [getattr(result, name) for result in self.classes.values() if getattr(result, name) is not None]
            means[name] = sum(values) / len(values) if values else None
        return means

    @property
    def unreadable(self) -> list[str]:
        """Paths of the test images that could not be read."""
        return [image.path for result in self.classes.values() for image in result.images if image.score is None]

    def to_dict(self) -> dict[str, Any]:
        """The content of results.json: ``classes`` (all attributes but ``images``), ``mean`` and ``settings``."""
        names = [field.name for field in fields(ClassResult) if field.name != "images"]
        classes = {key: {name: getattr(result, name) for name in names} for key, result in self.classes.items()}
        return {"classes": classes, "mean": self.mean, "settings": self.settings}

    def table(self) -> str:
        """The results for people: a line a class and the mean, fractions in percent, "-" where a metric is undefined."""
        rows = [["class", *(heading for heading, _, _ in _COLUMNS)]]
        for name, result in self.classes.items():
            rows.append([printable(name), *(_cell(getattr(result, key), is_fraction) for _, key, is_fraction in _COLUMNS)])
        rows.append(["mean", *(_cell(self.mean[key], is_fraction) for _, key, is_fraction in _COLUMNS)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes results.json and results.csv (a line an image) into a folder that exists, each whole or not at all.

        Raises:
            OSError: a file cannot be written.
        """
        write_json(Path(folder) / "results.json", self.to_dict())
        # A path that is not UTF-8 keeps its bytes.
        with (
            atomic_write(Path(folder) / "results.csv") as temporary,
            open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(["class", "path", "defect", "label", "score", "is_anomalous"])
            writer.writerows(self._lines())

    def _lines(self) -> Iterator[list[Any]]:
        for name, result in self.classes.items():
            for image in result.images:
                verdict = ["" if image.score is None else repr(image.score), "" if image.is_anomalous is None else int(image.is_anomalous)]
                yield [name, image.path, image.defect, int(image.is_defective), *verdict]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON in ASCII, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="ascii")


def printable(text: str) -> str:
    """A name on one line: line breaks, control characters and bytes that are no text as Python escapes."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _cell(value: float | None, is_fraction: bool) -> str:
    if value is None:
        return _UNDEFINED
    if is_fraction:
        return f"{100 * value:.2f}"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
