"""The paper's figures as SVG."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import numpy as np

from patchcore_ext.metrics import curves

from ..harness import line_chart
from .rows import HIERARCHIES, ROWS, SHOTS, rows_of
from .tables import METRICS, Results

_CURVE_ROWS = ("patchcore-10", "patchcore-1", "patchcore-25", "patchcore-100")
Points = list[tuple[float, float]]


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes the figures for which there are results; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []

    def chart(name: str, head: str, series: dict[str, Points], labels: tuple[str, str], **options: bool) -> None:
        series = {title: points for title, points in series.items() if len(points) > 1}
        if series:
            line_chart(folder / f"{name}.svg", head, series, labels, **options)
            made.append(folder / f"{name}.svg")

    auroc = "image AUROC, %"
    chart("retention", "Image AUROC by share of the patches that is kept", _retention(results), ("kept, %", auroc), log_x=True)
    chart("patch_size", "Neighbourhood", _varied(results, "patch", "patch_size"), ("p", "%"))
    chart("image_size", "Image size", _varied(results, "size", "size"), ("pixels", "%"))
    chart("hierarchies", _hierarchies_head(), _hierarchies(results), ("number of the union", "%"))
    models = ("patchcore-25", "patchcore-10", "padim", "spade")
    low_shot = {ROWS[name].title: [(float(n), v) for n in SHOTS for v in _mean(results, f"{name}-shots-{n}", "image_auroc")] for name in models}
    chart("low_shot", "Low shot: mean over seeds", low_shot, ("nominal images", auroc), log_x=True)
    precision_recall, roc = _curves(results)
    chart("precision_recall", "Precision and recall by class", precision_recall, ("recall", "precision"), markers=False)
    chart("roc", "ROC by class", roc, ("false positive rate", "true positive rate"), markers=False)
    return made


def _mean(results: Results, name: str, metric: str) -> list[float]:
    """The mean over seeds in percent, or nothing."""
    values = results.values(name, metric)
    return [100 * mean(values)] if values else []


def _retention(results: Results) -> dict[str, Points]:
    methods = {"patchcore": "greedy coreset", "random": "random", "proxies": "learned proxies"}
    series: dict[str, Points] = {title: [] for title in methods.values()}
    for row in rows_of("retention"):
        if not row.options:
            series[methods[row.method]] += [(100 * row.ratio, value) for value in _mean(results, row.name, "image_auroc")]
    return {title: sorted(points) for title, points in series.items()}


def _varied(results: Results, group: str, attribute: str) -> dict[str, Points]:
    """Metrics by an attribute of the rows of a group and of the default."""
    rows = [ROWS["patchcore-1"], *rows_of(group)]
    places = {row.name: float(getattr(row, attribute) or 224) for row in rows}
    return {title: sorted((places[row.name], v) for row in rows for v in _mean(results, row.name, metric)) for metric, title in METRICS.items()}


def _hierarchy_row(number: tuple[int, ...]) -> str:
    return "patchcore-1" if number == (2, 3) else "layers-" + "".join(map(str, number))


def _hierarchies_head() -> str:
    return "Hierarchies: " + ", ".join(f"{i}: {'+'.join(map(str, number))}" for i, number in enumerate(HIERARCHIES, start=1))


def _hierarchies(results: Results) -> dict[str, Points]:
    places = list(enumerate(HIERARCHIES, start=1))
    return {title: [(float(i), v) for i, number in places for v in _mean(results, _hierarchy_row(number), metric)] for metric, title in METRICS.items()}


def _curves(results: Results) -> tuple[dict[str, Points], dict[str, Points]]:
    """Precision-recall and ROC of each class, of the first main row that was run, seed 0."""
    precision_recall: dict[str, Points] = {}
    roc: dict[str, Points] = {}
    name = next((name for name in _CURVE_ROWS if results.rows.get(name, {}).get("runs")), None)
    for item, entry in results.rows[name]["runs"][0].items() if name else ():
        images = [image for image in entry["result"]["images"] if image["score"] is not None]
        found = curves(np.array([image["is_defective"] for image in images]), np.array([image["score"] for image in images]))
        precision_recall[item] = list(zip(found.recall.tolist(), found.precision.tolist(), strict=True))
        roc[item] = list(zip(found.fpr.tolist(), found.tpr.tolist(), strict=True))
    return precision_recall, roc
