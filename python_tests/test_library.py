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


@pytest.mark.skipif("amx" not in patchcore_ext.build_info()["cpu_levels"], reason="this processor lacks AMX")
def test_where_the_system_does_not_lend_amx_another_level_is_used() -> None:
    """Linux declines where a thread has a signal stack that is too small for the tile registers."""
    small_stack = (
        "import ctypes\n"
        "class Stack(ctypes.Structure): _fields_ = [('start', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]\n"
        "memory = ctypes.create_string_buffer(8192)\n"
        "assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 8192)), None) == 0\n"
        "import patchcore_ext; print(patchcore_ext.build_info()['cpu_level'])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PATCHCORE_EXT_CPU_LEVEL"}
    chosen = subprocess.run([sys.executable, "-c", small_stack], env=environment, capture_output=True, text=True, check=False)
    assert chosen.stdout.strip() == "avx512", chosen.stderr
    forced = run(small_stack, PATCHCORE_EXT_CPU_LEVEL="amx")
    assert "the system does not lend this process what PATCHCORE_EXT_CPU_LEVEL=amx needs" in forced.stderr


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


@pytest.fixture
def needs_cuda_kernels() -> None:
    problem = patchcore_ext.build_info()["cuda_problem"]
    if problem is not None:
        pytest.skip(f"the CUDA library was not looked at: {problem}")


@pytest.mark.usefixtures("needs_cuda_kernels")
def test_cuda_kernels_load_without_a_gpu() -> None:
    code = """
import json, torch, patchcore_ext
assert torch._C._dispatch_has_kernel_for_dispatch_key("patchcore_ext::square_root", "CUDA")
print(json.dumps(patchcore_ext.build_info()))
"""
    result = run(code, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    info = json.loads(result.stdout)
    assert info["cuda_kernels"] is True
    assert info["cuda_problem"] is None
    assert info["cuda_available"] is False
    assert info["cuda_unavailable"].startswith("torch sees no CUDA device")
    assert info["cuda_devices"] == []
    assert info["cuda_toolkit"].split(".")[0] == str(torch.version.cuda).split(".")[0]
    assert info["cuda_archs"]
    assert all(_library._covers([arch], tuple(map(int, arch.removesuffix("+PTX").rstrip("af").split(".")))) for arch in info["cuda_archs"])


def test_a_torch_without_cuda_ignores_the_cuda_library(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "patchcore_ext", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "patchcore_ext" / "_C_cuda.so").write_bytes(b"would fail to load")
    code = f"""
import sys, torch
sys.path.insert(0, {str(tmp_path)!r})
torch.version.cuda = None
import patchcore_ext
assert "patchcore_ext._C_cuda" not in sys.modules
print(patchcore_ext.ops.first_nonfinite_row(torch.ones(2, 2)), patchcore_ext.build_info()["cuda_problem"])
"""
    result = run(code)
    assert result.stdout.strip() == "-1 this torch was built without CUDA", result.stderr


def test_a_cuda_library_that_fails_to_load_leaves_the_cpu_whole(tmp_path: Path) -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch was built without CUDA: a failing CUDA library was not tried")
    shutil.copytree(PACKAGE, tmp_path / "patchcore_ext", ignore=shutil.ignore_patterns("__pycache__", "_C_cuda*"))
    (tmp_path / "patchcore_ext" / "_C_cuda.so").write_bytes(b"no library")
    code = f"""
import sys, torch
sys.path.insert(0, {str(tmp_path)!r})
import patchcore_ext
print(patchcore_ext.ops.first_nonfinite_row(torch.ones(2, 2)), patchcore_ext.build_info()["cuda_problem"])
"""
    result = run(code)
    assert result.stdout.startswith("-1 patchcore_ext: the native library _C_cuda did not load ("), result.stderr
    assert "pip install --no-build-isolation -e ." in result.stdout


@pytest.mark.parametrize(
    ("archs", "capability", "covered"),
    [
        (["8.0"], (8, 0), True),
        (["8.0"], (8, 9), True),
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (12, 1), True),
        (["8.0+PTX"], (7, 5), False),
        (["9.0a"], (9, 0), True),
        (["10.0a"], (10, 3), False),
        (["7.5", "12.0+PTX"], (10, 0), False),
        (["7.5", "12.0+PTX"], (13, 0), True),
    ],
)
def test_machine_code_runs_on_its_family_and_ptx_on_what_came_later(archs: list[str], capability: tuple[int, int], covered: bool) -> None:
    assert _library._covers(archs, capability) is covered


@pytest.mark.parametrize(
    ("capability", "sentence"),
    [
        ((9, 0), None),
        (
            (8, 6),
            'this build has CUDA kernels for 9.0, none for Card (compute capability 8.6); rebuild with TORCH_CUDA_ARCH_LIST="8.6"; move the tensor with .cpu()',
        ),
        ((7, 0), "the CUDA kernels need compute capability 7.5 or newer, Card (compute capability 7.0) is older; move the tensor with .cpu()"),
    ],
)
def test_a_device_that_the_build_does_not_cover_is_explained(capability: tuple[int, int], sentence: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_cuda_problem", None)
    monkeypatch.setattr(_library, "_cuda_archs", lambda: ["9.0"])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card")
    _library._device_problem.cache_clear()
    try:
        assert _library.kernel_problem(torch.device("cuda", 1)) == sentence
    finally:
        _library._device_problem.cache_clear()


def test_a_driver_that_is_too_old_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update it.\nMore lines.")

    monkeypatch.setattr(_library, "_cuda_problem", None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    problem = "torch sees no CUDA device: The NVIDIA driver on your system is too old (found version 11040). Please update it."
    assert _library.kernel_problem(torch.device("cuda")) == f"{problem}; move the tensor with .cpu()"


def test_foreign_runtime_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="^something else$"), _checks.native_errors():
        raise RuntimeError("something else")
    with pytest.raises(ValueError, match="^op: the sentence.$"), _checks.native_errors():
        raise RuntimeError("file.cpp:3: patchcore_ext: op: the sentence.\nmore lines")
