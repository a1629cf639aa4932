"""The study's results as Markdown, JSON and figures."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..harness import RESULTS, ROOT, machine
from . import exactness, figures
from .datasets import Dataset
from .maps import digest_of
from .tables import Results, Table, tables

_LEFT_OUT = ("images", "seconds", "problems")


@dataclass(frozen=True)
class Report:
    """All that is written.

    Attributes:
        name: of the data set.
        results: of the rows.
        tables: of the paper.
        content: of the JSON file.
        head: the beginning of the Markdown file.
    """

    name: str
    results: Results
    tables: list[Table]
    content: dict[str, Any]
    head: str

    def markdown(self, pictures: list[str]) -> str:
        """The page, with pictures at these places."""
        parts = [self.head, *(table.markdown() for table in self.tables)]
        if self.content["exactness"] is not None:
            text = f"{exactness.NOMINAL} nominal and {exactness.TESTED} test images of the first class, 1%; compared with the first line."
            parts += [f"**Exactness. {text}**", exactness.markdown(self.content["exactness"])]
        return "\n\n".join([*parts, *(f"![{Path(place).stem.replace('_', ' ')}]({place})" for place in pictures)]) + "\n"


def make(dataset: Dataset, rows: dict[str, Any], exact: list[dict[str, Any]] | None, settings: dict[str, Any]) -> Report:
    """The report of a run.

    Args:
        dataset: with its notes.
        rows: as Study.run gives them.
        exact: as exactness.compare gives them, or None.
        settings: "base", "aggregation", "seeds", "command" and "seconds".
    """
    results = Results(rows)
    made = tables(results, dataset)
    numbers = {name: _numbers(row) for name, row in rows.items()}
    content = {
        "machine": machine(),
        "dataset": dataset.name,
        "settings": settings,
        "notes": list(dataset.notes),
        "numbers_digest": digest_of(numbers),  # of all that does not depend on the clock: the same again on a second run
        "rows": {name: {**row, **_times(rows[name])} for name, row in numbers.items()},
        "tables": [asdict(table) for table in made],
        "exactness": exact,
    }
    return Report(dataset.name, results, made, content, _head(dataset, content))


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what depends on the clock, and without the single images."""
    if "unavailable" in row:
        return {"unavailable": row["unavailable"]}

    def without_images(entry: dict[str, Any]) -> dict[str, Any]:
        return {"result": {key: value for key, value in entry["result"].items() if key not in _LEFT_OUT}, "facts": entry["facts"]}

    runs = [{item: without_images(entry) for item, entry in run.items()} for run in row["runs"]]
    return {"backbone": row["backbone"], "runs": runs}


def _times(row: dict[str, Any]) -> dict[str, Any]:
    return {} if "unavailable" in row else {"seconds": [{item: entry["seconds"] for item, entry in run.items()} for run in row["runs"]]}


def _head(dataset: Dataset, content: dict[str, Any]) -> str:
    told, settings = content["machine"], content["settings"]
    lines = [
        f"# The paper's rows on {dataset.title}",
        f"{told['date']}; {told['processor']}, {told['cores']} cores, {told['cpu_level']}; Python {told['python']}, torch {told['torch']}, patchcore_ext "
        f"{told['patchcore_ext']}, commit {told['commit']}. Base backbone {settings['base']}, aggregation {settings['aggregation']}, {settings['seeds']} seeds "
        "where there is a deviation.",
        f"```\n{settings['command']}\n```",
        "The paper's figures are those of MVTec AD with WideResNet50 unless a table says otherwise: where ours are of other images or another network, they "
        "stand beside ours for orientation, not as a comparison. Numbers of tables S1 to S6 are this project's. A dash: undefined, not published or, for "
        "pixels, not measured (where a protocol asks for image AUROC alone, pixels are measured for the main rows).",
        "\n".join(f"- {note}" for note in dataset.notes),
        f"Everything but the times comes out the same again; digest of all numbers: `{content['numbers_digest']}`.",
    ]
    return "\n\n".join(line for line in lines if line)


def write(report: Report, folder: Path) -> list[Path]:
    """paper.md, paper.json and figures/ in a folder."""
    pictures = figures.draw(report.results, folder / "figures")
    return _written(report, folder / "paper.md", folder / "paper.json", pictures)


def publish(report: Report) -> list[Path]:
    """The same in benchmarks/: paper_NAME.md, and the others below results/."""
    pictures = figures.draw(report.results, RESULTS / f"paper_{report.name}")
    return _written(report, ROOT / "benchmarks" / f"paper_{report.name}.md", RESULTS / f"paper_{report.name}.json", pictures)


def _written(report: Report, page: Path, data: Path, pictures: list[Path]) -> list[Path]:
    page.write_text(report.markdown([picture.relative_to(page.parent).as_posix() for picture in pictures]), encoding="utf-8")
    data.write_text(json.dumps(report.content, indent=1) + "\n", encoding="utf-8")
    return [page, data, *pictures]
