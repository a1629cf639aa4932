"""The paper's tables from results, the paper's figure beside ours; numbers of tables as far as this project knows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from . import published
from .datasets import Dataset
from .rows import ROWS, SHOTS, Row, rows_of

METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "aupro": "PRO"}
_NONE = "-"


@dataclass(frozen=True)
class Table:
    """A table for people.

    Attributes:
        number: of the paper, or a word.
        title: what it shows.
        header: of the columns.
        lines: cells, as text.
    """

    number: str
    title: str
    header: list[str]
    lines: list[list[str]]

    def markdown(self) -> str:
        """The table with its title."""
        lines = [f"**{self.number}. {self.title}**", "", "| " + " | ".join(self.header) + " |", "|" + "---|" * len(self.header)]
        return "\n".join([*lines, *("| " + " | ".join(line) + " |" for line in self.lines)])


class Results:
    """What the rows gave.

    Args:
        rows: as Study.run gives them.
    """

    def __init__(self, rows: dict[str, Any]) -> None:
        self.rows = rows

    def values(self, name: str, metric: str, item: str | None = None) -> list[float]:
        """A metric of a row by seed, of a class or its mean over the classes that have it; empty where there is none."""
        found = []
        for run in self.rows.get(name, {}).get("runs", []):
            each = [entry["result"][metric] for key, entry in run.items() if item in (None, key) and entry["result"][metric] is not None]
            found += [mean(each)] if each else []
        return found

    def sums(self, name: str, metric: str) -> list[int]:
        """A count of a row by seed, over all classes."""
        runs = self.rows.get(name, {}).get("runs", [])
        each = [[entry["result"][metric] for entry in run.values()] for run in runs]
        return [sum(part) for part in each if None not in part]

    def fact(self, name: str, fact: str) -> float | None:
        """A fact about a row's bank, the mean over classes, of seed 0."""
        runs = self.rows.get(name, {}).get("runs", [])
        each = [entry["facts"][fact] for entry in runs[0].values() if fact in entry["facts"]] if runs else []
        return mean(each) if each else None

    def percent(self, name: str, metric: str, item: str | None = None) -> str:
        """A cell: percent, with the deviation over seeds where there are several, or why there is no number."""
        values = [100 * value for value in self.values(name, metric, item)]
        if len(values) > 1:
            return f"{mean(values):.2f} ± {stdev(values):.2f}"
        if values:
            return f"{values[0]:.2f}"
        row = self.rows.get(name)
        if row is None:
            return "not asked for"
        return f"not run: {row['unavailable']}" if "unavailable" in row else _NONE


def _figure(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1f}"


def _count(values: Sequence[float]) -> str:
    return f"{mean(values):g}" if values else _NONE


def tables(results: Results, dataset: Dataset) -> list[Table]:
    """All of them."""
    return [
        *_main(results),
        _larger(results),
        _times(results),
        _other_datasets(results, dataset),
        *_by_class(results, dataset),
        _backbones(results),
        *_low_shot(results),
        _ablations(results),
    ]


def _main(results: Results) -> Iterator[Table]:
    """Tables 1 to 3."""
    for position, (metric, title) in enumerate(METRICS.items()):
        header = ["system", f"paper's {title}, MVTec AD", title]
        if position == 0:
            header += ["misclassified, paper's", "misclassified", "false alarms at full recall", "share of the bank in use"]
        lines = [[f"{name} (published)", _figure(values[position]), *[""] * (len(header) - 2)] for name, values in published.OTHERS.items() if values[position]]
        for row in rows_of("main"):
            line = [row.title, _figure(published.MEANS[row.name][position]), results.percent(row.name, metric)]
            if position == 0:
                used = results.fact(row.name, "share_in_use")
                line += [f"{published.MISCLASSIFIED.get(row.name, _NONE)}", _count(results.sums(row.name, "misclassified"))]
                line += [_count(results.sums(row.name, "errors_at_full_recall")), _NONE if used is None else f"{100 * used:.0f}%"]
            lines.append(line)
        yield Table(str(position + 1), f"{title} in percent", header, lines)


def _three(results: Results, rows: Sequence[Row]) -> list[list[str]]:
    """Of each row: title, and paper's and ours of the three metrics."""
    lines = []
    for row in rows:
        figures = published.MEANS.get(row.name, (None, None, None))
        cells = [cell for metric, value in zip(METRICS, figures, strict=True) for cell in (_figure(value), results.percent(row.name, metric))]
        if "unavailable" in results.rows.get(row.name, {}):
            cells[3:6:2] = [_NONE, _NONE]  # the reason once
        lines.append([row.title, *cells])
    return lines


_THREE = ["system", *(text for title in METRICS.values() for text in (f"paper's {title}, MVTec AD", title))]


def _larger(results: Results) -> Table:
    return Table("4", "Larger images, larger networks, ensembles, at 1%", _THREE, _three(results, rows_of("larger")))


def _backbones(results: Results) -> Table:
    return Table("S4", "Backbones", _THREE, _three(results, rows_of("backbones")))


def _ablations(results: Results) -> Table:
    default = [ROWS["patchcore-1"]]
    lines: list[list[str]] = []
    for group, title in (("patch", "neighbourhood"), ("stride", "stride"), ("layers", "hierarchies"), ("size", "image size"), ("retention", "sampler")):
        rows = rows_of(group) if group == "retention" else [*default, *rows_of(group)]
        lines += [[f"{title}: {cells[0]}", *cells[1:]] for cells in _three(results, rows)]
    return Table("Ablations", "One thing changed; PatchCore-1% is p = 3, stride 1, hierarchies 2 + 3, 224 px", _THREE, lines)


def _times(results: Results) -> Table:
    """Table 5; of seed 0, summed over classes and divided by their test images."""
    lines = []
    for row in rows_of("times"):
        runs = results.rows.get(row.name, {}).get("runs", [])
        if not runs:
            lines.append([row.title, _figure_seconds(row.name), results.percent(row.name, "image_auroc"), _NONE, _NONE])
            continue
        entries = list(runs[0].values())
        images = sum(len(entry["result"]["images"]) for entry in entries)
        score = 1000 * sum(entry["seconds"]["score"] for entry in entries) / images
        forward = 1000 * mean(entry["seconds"]["forward"] for entry in entries)
        lines.append([row.title, _figure_seconds(row.name), f"{forward + score:.0f}", f"{forward:.0f}", f"{score:.1f}"])
    header = ["system", "paper's ms an image, WRN50, GPU", "ms an image", "of it loading and network", "of it scoring"]
    return Table("5", "Time an image; SPADE and PaDiM include what they do once", header, lines)


def _figure_seconds(name: str) -> str:
    return f"{1000 * published.SECONDS[name]:.0f}" if name in published.SECONDS else _NONE


def _other_datasets(results: Results, dataset: Dataset) -> Table:
    lines = []
    for key, (metric, values) in published.OTHER_DATASETS.items():
        name = "pixel_auroc" if metric == "pixel AUROC" else "image_auroc"
        for title, value in values.items():
            ours = results.percent("patchcore-10", name) if title == "PatchCore-10%" and dataset.name == key else _NONE
            if ours != _NONE and dataset.notes:
                ours += f" ({dataset.notes[0].split(',')[0].lower()})"  # the rule of the split
            lines.append([{"mtd": "magnetic tiles", "mstc": "ShanghaiTech"}[key], title, metric, _figure(value), ours])
    if dataset.name == "mtd":
        lines += [["magnetic tiles", row.title, "image AUROC", _NONE, results.percent(row.name, "image_auroc")] for row in rows_of("splits")]
    return Table("6", "Other data sets", ["data set", "system", "metric", "paper's", "ours"], lines)


def _by_class(results: Results, dataset: Dataset) -> Iterator[Table]:
    """S1 to S3, and S6."""
    names = [item.name for item in dataset.classes]

    def lines_of(rows: Sequence[Row], metrics: Sequence[str], label: Callable[[Row, str], str]) -> list[list[str]]:
        lines = []
        for row in rows:
            for metric in metrics:
                figures = published.BY_CLASS.get((row.name, metric))
                if figures is not None and dataset.name == "mvtec":
                    of = dict(zip(published.CLASSES, figures, strict=True))
                    lines.append([f"{label(row, metric)}, paper's", *(_figure(of[name]) for name in names), _figure(mean(of[name] for name in names))])
                cells = [results.percent(row.name, metric, name) for name in names]
                lines.append([label(row, metric), *cells, results.percent(row.name, metric)])
        return lines

    for position, (metric, title) in enumerate(METRICS.items(), start=1):
        lines = lines_of(rows_of("main"), [metric], lambda row, _: row.title)
        yield Table(f"S{position}", f"{title} by class", ["system", *names, "mean"], lines)
    wide = [row for row in rows_of("larger") if row.name.startswith("wrn101")]
    lines = lines_of(wide, list(METRICS), lambda row, metric: f"{row.title}, {METRICS[metric]}")
    yield Table("S6", "Larger images and networks by class", ["system", *names, "mean"], lines)


def _low_shot(results: Results) -> Iterator[Table]:
    """S5, a table for each metric that there are results of."""
    for metric, title in METRICS.items():
        models = ("spade", "padim", "patchcore-10", "patchcore-25")
        if metric != "image_auroc" and not any(results.values(f"{name}-shots-{shots}", metric) for name in models for shots in SHOTS):
            continue
        lines = []
        for name in models:
            figures = [_figure(value) for value in published.LOW_SHOT[name, metric]]
            if metric == "image_auroc":
                figures = [f"{figure} ± {deviation}" for figure, deviation in zip(figures, published.LOW_SHOT_DEVIATIONS[name], strict=True)]
            lines.append([f"{ROWS[name].title}, paper's, MVTec AD", *figures])
            lines.append([ROWS[name].title, *(results.percent(f"{name}-shots-{shots}", metric) for shots in SHOTS)])
        yield Table("S5", f"Low shot: {title} by number of nominal images, mean and deviation over seeds", ["system", *map(str, SHOTS)], lines)
