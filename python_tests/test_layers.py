"""The floors of the house: a file imports only from floors below it, and the core knows nothing of torch."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "patchcore_ext"

# From the ground up; modules of one floor do not import each other.
FLOORS = (
    {"_version"},
    {"_library"},
    {"_checks", "_random", "_fake", "reference", "images", "_backbone", "_spool", "_pictures"},
    {"_rotation", "memory_bank", "data", "layout", "features", "_pixel_metrics"},
    {"ops", "threshold", "metrics"},
    {"coreset", "scoring", "_model_file", "_extraction", "_batch_size"},
    {"_calibration"},
    {"patchcore"},
    {"report"},
    {"_results", "_evaluation_results"},
    {"_measurement"},
    {"evaluation"},
    {"_cli_options"},
    {"_cli_evaluate", "_cli_inspect"},
    {"cli"},
    {"__init__"},
    {"__main__"},
)
TORCH_FREE = {"_version", "_random"}


def floor_of(module: str) -> int:
    floors = [level for level, modules in enumerate(FLOORS) if module in modules]
    assert floors, f"{module} has no floor yet: give it one in test_layers.py"
    return floors[0]


def imports_of(path: Path) -> set[str]:
    """Names of the package's own modules that a file imports, and of the third parties, the latter with their dots cut."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names |= {f".{node.module.split('.')[0]}"} if node.module else {f".{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    return names


MODULES = sorted(path for path in PACKAGE.glob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_import_from_below(path: Path) -> None:
    own = {name[1:] for name in imports_of(path) if name.startswith(".")} - {""}
    for module in own:
        assert floor_of(module) < floor_of(path.stem), f"{path.name} imports {module} from the same floor or above"
    assert "patchcore_ext" not in imports_of(path) or path.stem == "__main__", f"{path.name} must import its neighbours relatively"


def test_reference_stands_apart() -> None:
    assert imports_of(PACKAGE / "reference.py") <= {"__future__", "math", "torch"}


def test_integrations_are_imported_by_nobody() -> None:
    for path in MODULES:
        assert ".integrations" not in imports_of(path)
        assert not imports_of(path) & {"anomalib", "faiss", "patchcore"}


@pytest.mark.parametrize("name", sorted(TORCH_FREE))
def test_some_modules_need_no_torch(name: str) -> None:
    assert "torch" not in imports_of(PACKAGE / f"{name}.py")


def includes_of(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), flags=re.MULTILINE)


CORE = ROOT / "csrc" / "core"
CORE_FILES = sorted(path for path in CORE.rglob("*") if path.suffix in {".h", ".cpp", ".cuh", ".cu"})


@pytest.mark.parametrize("path", CORE_FILES, ids=lambda path: str(path.relative_to(CORE)))
def test_core_includes_no_torch_and_keeps_its_halves_apart(path: Path) -> None:
    for include in includes_of(path):
        assert not include.startswith(("torch/", "ATen/", "c10/", "pybind11/", "Python.h")), f"{path.name} includes {include}"
        if path.parent.name == "cpu":
            assert not include.startswith("cuda")
        if path.parent.name == "cuda":
            assert not include.startswith("cpu/")


@pytest.mark.parametrize("path", CORE_FILES, ids=lambda path: str(path.relative_to(CORE)))
def test_core_neither_throws_nor_starts_threads(path: Path) -> None:
    code = re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))
    assert not re.search(r"\bthrow\b|std::thread\b|#pragma omp|\bmalloc\(|\bnew\s+\w", code), path.name


def test_only_the_level_files_are_compiled_for_an_instruction_set() -> None:
    for path in CORE_FILES:
        if not path.name.startswith("level_"):
            assert "GCC target" not in path.read_text(encoding="utf-8"), path.name
        elif "GCC target" in path.read_text(encoding="utf-8"):
            # Nothing with external linkage may come from a header below the pragma: level files include a few headers without template functions.
            plain = {"cpu/dispatch.h", "cpu/level_avx2.h", "cpu/level_avx512.h", "cpu/stages.h", "cpu/vnni256.inc", "cpu/amx_scan.inc"}
            assert set(includes_of(path)) <= {"immintrin.h", *plain}, path.name
