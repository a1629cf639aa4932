"""The documents: links lead somewhere, and the Python in them runs."""

from __future__ import annotations

import doctest
import importlib
import json
import re
from pathlib import Path

import pytest

import patchcore_ext

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])
MODULES = sorted(path.stem for path in Path(patchcore_ext.__file__).parent.glob("*.py") if path.stem not in {"__main__", "__init__"})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_to_files(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_named_in_code_style_exist(document: Path) -> None:
    for name in re.findall(r"`((?:csrc|patchcore_ext|python_tests|docs|examples)/[\w./*]+)`", document.read_text(encoding="utf-8")):
        assert any(ROOT.glob(name.rstrip("/"))), f"{document.name} names {name}"


def test_files_named_in_the_makefile_exist() -> None:
    names = re.findall(r"\b(?:csrc|tools|python_tests|examples)/[\w/]+\.\w+", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert len(names) > 5
    for name in names:
        assert (ROOT / name).exists(), f"Makefile names {name}"


def generated(name: str) -> str:
    """What stands between a name's marks in the benchmarks' README."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    return text.partition(f"<!-- {name}: generated -->")[2].partition(f"<!-- /{name} -->")[0]


@pytest.mark.parametrize("name", ["coreset", "coreset_avx2", "features", "knn", "knn_avx2", "levels", "pipelines"])
def test_tables_of_benchmarks_are_those_of_the_result_files(name: str) -> None:
    from benchmarks.harness import read_rows

    module = importlib.import_module(f"benchmarks.bench_{name.partition('_')[0]}")
    table = module.tables if hasattr(module, "tables") else module.table
    rows = read_rows(name)
    assert rows
    assert table(rows) in generated(name)


def test_the_gpu_tables_are_those_of_the_result_file() -> None:
    """What python -m benchmarks.gpu_tables writes between its marks, and the calculated section behind it."""
    from benchmarks import gpu_roofs, gpu_tables

    results = json.loads((ROOT / "benchmarks" / "results" / "gpu.json").read_text(encoding="utf-8"))
    assert generated("gpu-measured") == f"\n\n{gpu_tables.text(results)}\n\n"
    assert generated("gpu") == f"\n\n{gpu_roofs.text()}\n\n"


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"patchcore_ext.{name}")).failed == 0


def test_readme_examples_on_made_up_features_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    runnable = [block for block in blocks if "bottle" not in block]  # the others need images of bottles
    assert len(runnable) == 1
    exec(compile(runnable[0], "README.md", "exec"), {})
