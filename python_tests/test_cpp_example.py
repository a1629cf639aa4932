"""examples/cpp: built against an installed core, it gives the bits that Python gives."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_features

from patchcore_ext import CoresetSampler, PatchScorer

ROOT = Path(__file__).parents[1]


RECIPE = (ROOT / "docs" / "recipes" / "cpp.md").read_text(encoding="utf-8")


def block_of_recipe(language: str) -> str:
    """The one block of that language in docs/recipes/cpp.md."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", RECIPE, flags=re.DOTALL | re.MULTILINE)
    return str(block)


def shell(commands: str, folder: Path) -> str:
    environment = {**os.environ, "CMAKE_BUILD_PARALLEL_LEVEL": "2", **({"CMAKE_GENERATOR": "Ninja"} if shutil.which("ninja") else {})}
    process = subprocess.run(["sh", "-eu", "-c", commands], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the recipe's commands have run, with links to what is in this one."""
    if shutil.which("cmake") is None or not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip("no cmake or no C++ compiler: the C++ example was not built")
    folder = tmp_path_factory.mktemp("cpp")
    for name in ("CMakeLists.txt", "cmake", "csrc", "examples", "patchcore_ext"):
        (folder / name).symlink_to(ROOT / name)
    shell(block_of_recipe("sh"), folder)
    shutil.rmtree(folder / "build" / "core")  # what was installed is enough
    return folder


@pytest.fixture(scope="module")
def program(built: Path) -> Path:
    return built / "build" / "example" / "score_features"


def test_the_program_of_the_recipe_builds_and_runs(built: Path) -> None:
    project = built / "project"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(block_of_recipe("cmake"))
    (project / "nearest.cpp").write_text(block_of_recipe("cpp"))
    flags = "-Wall -Wextra -Werror"  # the headers give no warnings to others
    shell(f"cmake -S . -B build -DCMAKE_PREFIX_PATH={built}/build/prefix -DCMAKE_CXX_FLAGS='{flags}' && cmake --build build", project)
    assert shell("build/nearest", project) == "row 0 at squared distance 9\n"


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("kind", "dim"), [("random", 24), ("offset", 24), ("duplicate", 5), ("random", 1)])
@pytest.mark.parametrize("threads", [1, 3])
def test_scores_and_picks_are_the_bits_of_python(program: Path, tmp_path: Path, kind: str, dim: int, threads: int) -> None:
    good, test = make_features(kind, 1500, dim), make_features(kind, 120, dim, seed=1)
    np.save(tmp_path / "good.npy", good.numpy())
    np.save(tmp_path / "test.npy", test.numpy())
    for kept in (1, 300):
        process = run(program, tmp_path / "good.npy", tmp_path / "test.npy", kept, 40, threads)
        assert process.returncode == 0, process.stderr
        first, *lines = process.stdout.splitlines()
        picks = CoresetSampler(num_samples=kept, projection_dim=None, start=0, progress=False).select(good).indices
        assert [int(word) for word in first.split()[1:]] == picks.tolist()
        expected = PatchScorer(good[picks])(test.view(3, 40, dim)).image_scores
        assert torch.equal(torch.tensor([float(line) for line in lines], dtype=torch.float32), expected)


def test_wrong_input_is_told(program: Path, tmp_path: Path) -> None:
    good = make_features("random", 20, 4).numpy()
    np.save(tmp_path / "good.npy", good)
    np.save(tmp_path / "double.npy", good.astype(np.float64))
    np.save(tmp_path / "vector.npy", good[0])
    bad = good.copy()
    bad[7, 1] = np.nan
    np.save(tmp_path / "bad.npy", bad)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:-4])
    (tmp_path / "text.npy").write_text("no array")
    for name, sentence in {
        "absent.npy": "cannot be opened",
        "double.npy": "expected a float32 matrix in C order",
        "vector.npy": "expected two dimensions",
        "bad.npy": "got NaN or infinity in row 7",
        "cut.npy": "is cut off",
        "text.npy": "is no .npy file",
    }.items():
        process = run(program, tmp_path / name, tmp_path / "good.npy", 2, 4)
        assert process.returncode == 1
        assert sentence in process.stderr
    assert "expected KEPT to be at most the rows of GOOD, 20" in run(program, tmp_path / "good.npy", tmp_path / "good.npy", 21, 4).stderr
    assert "expected PATCHES to be a positive number, got x" in run(program, tmp_path / "good.npy", tmp_path / "good.npy", 2, "x").stderr
    assert run(program).returncode == 2
