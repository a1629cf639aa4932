"""Loading the native library: what it tells, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import patchcore_ext
from patchcore_ext import _checks, _library

PACKAGE = Path(patchcore_ext.__file__).parent


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def test_build_info_is_json_and_true() -> None:
    info = json.loads(json.dumps(patchcore_ext.build_info()))
    assert info["version"] == patchcore_ext.__version__
    assert info["torch"] == torch.__version__
    assert info["cpu_level"] in info["cpu_levels"]
    assert info["cpu_levels"][0] == "scalar"
    assert info["cuda_kernels"] is (info["cuda_problem"] is None)
    assert info["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("level", patchcore_ext.build_info()["cpu_levels"])
def test_a_level_can_be_forced(level: str) -> None:
    result = run("import patchcore_ext; print(patchcore_ext.build_info()['cpu_level'])", PATCHCORE_EXT_CPU_LEVEL=level)
    assert result.stdout.strip() == level, result.stderr


def test_an_unknown_level_is_refused() -> None:
    result = run("import patchcore_ext", PATCHCORE_EXT_CPU_LEVEL="mmx")
    assert result.returncode != 0
    assert "expected PATCHCORE_EXT_CPU_LEVEL to be a level of this processor (scalar" in result.stderr
    assert "got 'mmx'" in result.stderr


def test_a_missing_library_names_the_remedy(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "patchcore_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # -S: without the finder of an editable install, which would lend its own library.
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(Path(torch.__file__).parents[1])!r}]; import patchcore_ext"
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: patchcore_ext: the native library _C did not load" in result.stderr
    assert "pip install --no-build-isolation -e ." in result.stderr


def test_a_library_of_another_version_is_refused(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "patchcore_ext", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "patchcore_ext" / "_version.py").write_text('__version__ = "99.0"\n', encoding="utf-8")
    result = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import patchcore_ext")
    assert "ImportError: patchcore_ext: the native library is of version 0.1.0, the package of 99.0" in result.stderr


def test_a_second_copy_in_one_process_is_refused(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "patchcore_ext", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"""
import sys, patchcore_ext
for name in [name for name in sys.modules if name.startswith("patchcore_ext")]: del sys.modules[name]
sys.path.insert(0, {str(tmp_path)!r})
import patchcore_ext
"""
    assert "ImportError: patchcore_ext: another copy of this package is loaded" in run(code).stderr


def test_devices_without_kernels_are_explained() -> None:
    assert _library.kernel_problem(torch.device("cpu")) is None
    assert "none for xpu" in str(_library.kernel_problem(torch.device("xpu")))
    if not patchcore_ext.build_info()["cuda_kernels"]:
        assert "no CUDA kernels; move the tensor with .cpu()" in str(_library.kernel_problem(torch.device("cuda")))


def test_foreign_runtime_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="^something else$"), _checks.native_errors():
        raise RuntimeError("something else")
    with pytest.raises(ValueError, match="^op: the sentence.$"), _checks.native_errors():
        raise RuntimeError("file.cpp:3: patchcore_ext: op: the sentence.\nmore lines")
