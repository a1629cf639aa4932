"""The result folder of ``patchcore-ext predict``: a table (CSV and JSON), heat maps, raw anomaly maps and the report page."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.PngImagePlugin
from torch import Tensor

from .images import load_image
from .memory_bank import atomic_write
from .patchcore import Prediction
from .report import Report, ReportEntry, default_color_range, heat_map_image

MAP_FORMATS = ("npy", "tiff", "png")
_LARGEST_16_BIT = 65535


class ResultFolder:
    """Writes the results of a run, image by image.

    Layout: ``heat_maps/`` (the image with its anomaly map) and, if asked for, ``maps/`` (raw anomaly maps), both with the folders that the
    images have below their common one; ``results.csv``, ``results.json`` and ``report.html``. Every file appears whole or not at all.

    Args:
        folder: made if it does not exist.
        paths: all images of the run.
        threshold: the decision threshold.
        color_scale: the distance in the middle of the colours of all heat maps, which go from 0.5 to 1.5 times of it (good images lie mostly
            in the lower half, and so do the places around a defect); 0: from 0 to 1.
        save_maps: "npy" (float32), "tiff" (float32), "png" (16 bit: distance = value / 65535 * map_scale, which results.json and a text
            entry of the file give) or None.

    Attributes:
        heat_map_range: (low, high) of the colours, in units of the anomaly map.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], paths: Sequence[str], *, threshold: float, color_scale: float, save_maps: str | None) -> None:
        self._folder = Path(folder)
        if self._folder.exists() and not self._folder.is_dir():
            raise NotADirectoryError(f"Cannot write results into {str(self._folder)!r}: that is a file; give the name of a folder.")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._names = unique_names(paths)
        self._threshold = threshold
        self._save_maps = save_maps
        self.heat_map_range = default_color_range(color_scale)
        self._rows: list[dict[str, Any]] = []
        self._report = Report(threshold, color_range=self.heat_map_range)

    def add(self, prediction: Prediction, *, defect: str | None = None, is_defective: bool | None = None, mask: npt.NDArray[Any] | None = None) -> None:
        """Writes the heat map and the raw map of one image and keeps the rest for finish.

        Args:
            prediction: of one of the images that the folder was made for, with its threshold.
            defect: name of the kind of defect or of another group, for the page; None: not named.
            is_defective: what is known to be true of the image, for the page; None: nothing is known.
            mask: array [H, W] of the image's size, not zero where the defect is, for the page; None: not known.

        Raises:
            ValueError: see :meth:`Report.add`.
            OSError: the image cannot be read or a file cannot be written.
        """
        image = load_image(prediction.path)
        name = self._names[prediction.path]
        row: dict[str, Any] = {"path": prediction.path, "score": prediction.score, "is_anomalous": prediction.is_anomalous}
        row["heat_map"] = f"heat_maps/{name}.png"
        low, high = self.heat_map_range
        self._write(row["heat_map"], heat_map_image(image, prediction.anomaly_map, low, high), "PNG")
        if self._save_maps is not None:
            row["map"] = f"maps/{name}.{self._save_maps}"
            if self._save_maps == "png":
                row["map_scale"] = float(prediction.anomaly_map.max())
            self._write_map(row["map"], prediction.anomaly_map)
        entry = ReportEntry(prediction.path, prediction.score, prediction.is_anomalous, image, prediction.anomaly_map, defect, is_defective, mask)
        self._report.add(entry)
        self._rows.append(row)

    def finish(
        self,
        model: str,
        summary: Mapping[str, str],
        covering_curve: Sequence[Sequence[float]] = (),
        metrics: Mapping[str, float | None] | None = None,
        unreadable: Sequence[str] = (),
    ) -> Path:
        """Writes the tables and the page.

        Args:
            model: name of the model, for the title and results.json.
            summary: lines for the top of the page.
            covering_curve: of the model's fit, for the page.
            metrics: figures for the top of the page; None as a value: not measured.
            unreadable: paths of images that could not be read, for results.json.

        Returns:
            The path of the page.
        """
        low, high = self.heat_map_range
        num_anomalous = sum(row["is_anomalous"] for row in self._rows)
        result = {
            "model": model,
            "threshold": self._threshold,
            "num_images": len(self._rows),
            "num_anomalous": num_anomalous,
            "heat_map_range": [low, high],
            "unreadable": list(unreadable),
            "predictions": self._rows,
        }
        with atomic_write(self._folder / "results.json") as temporary:
            temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="ascii")
        # A path that is not UTF-8 keeps its bytes.
        with (
            atomic_write(self._folder / "results.csv") as temporary,
            open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            _write_table(file, self._rows, self._threshold)
        page = self._folder / "report.html"
        title = f"{os.path.basename(model)}: anomalies"
        page_summary = {"Called anomalous": f"{num_anomalous} of {len(self._rows)} images", **summary}
        self._report.write(page, title=title, summary=page_summary, metrics=metrics, covering_curve=covering_curve)
        return page

    def _write_map(self, relative: str, anomaly_map: Tensor) -> None:
        values = anomaly_map.numpy()  # [H, W]
        if self._save_maps == "npy":
            with self._open(relative) as temporary, open(temporary, "wb") as file:
                np.save(file, values, allow_pickle=False)
        elif self._save_maps == "tiff":
            self._write(relative, PIL.Image.fromarray(values), "TIFF")
        else:
            scale = float(anomaly_map.max())
            steps = np.rint(values / scale * _LARGEST_16_BIT) if scale > 0 else np.zeros_like(values)
            text = PIL.PngImagePlugin.PngInfo()
            text.add_text("map_scale", repr(scale))
            self._write(relative, PIL.Image.fromarray(steps.astype(np.uint16)), "PNG", pnginfo=text)

    def _write(self, relative: str, image: PIL.Image.Image, image_format: str, **options: Any) -> None:
        with self._open(relative) as temporary:
            image.save(temporary, format=image_format, **options)

    def _open(self, relative: str) -> contextlib.AbstractContextManager[Path]:
        target = self._folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        return atomic_write(target, sync=False)


def unique_names(paths: Sequence[str]) -> dict[str, str]:
    """A name without suffix for the output files of each image: its path below the folder that all images share.

    Images that would get the same name (``a.png`` beside ``a.jpg``, or names that differ in case only) get their suffix or a number added.

    Args:
        paths: paths of images.

    Returns:
        Path to name, with "/" between folders.
    """
    unique = list(dict.fromkeys(paths))
    if not unique:
        return {}
    shared = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in unique])
    names: dict[str, str] = {}
    taken: set[str] = set()
    for path in unique:
        stem, suffix = os.path.splitext(os.path.relpath(os.path.abspath(path), shared).replace(os.sep, "/"))
        name, number = stem, 1
        while name.casefold() in taken:
            name = f"{stem}_{suffix.lstrip('.')}" if number == 1 else f"{stem}_{suffix.lstrip('.')}_{number}"
            number += 1
        taken.add(name.casefold())
        names[path] = name
    return names


def _write_table(file: IO[str], rows: Sequence[Mapping[str, Any]], threshold: float) -> None:
    writer = csv.writer(file)
    writer.writerow(["path", "score", "threshold", "verdict", "heat_map", "map"])
    for row in rows:
        verdict = "anomalous" if row["is_anomalous"] else "good"
        writer.writerow([row["path"], repr(row["score"]), repr(threshold), verdict, row["heat_map"], row.get("map", "")])
