"""How the native libraries are built: which CUDA compiler, for which GPUs, and what happens without one."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
KNOWN = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tools = _load("cuda_toolkit")


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def make_toolkit(home: Path, release: str = "13.0") -> Path:
    """A folder that looks like a CUDA toolkit."""
    for part in (*tools.PARTS, f"lib64/libcudart.so.{release.split('.')[0]}"):
        (home / part).parent.mkdir(parents=True, exist_ok=True)
        (home / part).touch()
    write_program(
        home / "bin" / "nvcc",
        f'case "$1" in\n--version) echo "Cuda compilation tools, release {release}, V{release}.1";;\n'
        "--list-gpu-arch) printf 'compute_80\\ncompute_120\\n';;\n"
        f'--dryrun) echo "#$ TOP={home}/bin/.." >&2;;\nesac',
    )
    return home


# Finding a compiler


def test_cuda_home_decides_alone(tmp_path: Path) -> None:
    home = make_toolkit(tmp_path / "cuda")
    other = make_toolkit(tmp_path / "other", "12.6")
    found = tools.find_toolkit({"CUDA_HOME": str(home), "PATH": str(other / "bin")}, "13.0")
    assert (found.home, found.version, found.runtime) == (home, (13, 0), home / "lib64" / "libcudart.so.13")
    assert found.archs() == ["8.0", "12.0"]
    with pytest.raises(tools.ToolkitError, match=r"nvcc was not found; set CUDA_HOME .* or `pip install \"nvidia-cuda-nvcc==13"):
        tools.find_toolkit({"CUDA_HOME": str(tmp_path / "nothing"), "PATH": str(home / "bin")}, "13.0")


def test_a_wrapper_on_path_leads_to_the_real_toolkit(tmp_path: Path) -> None:
    home = make_toolkit(tmp_path / "real")
    write_program(tmp_path / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    assert tools.find_toolkit({"PATH": str(tmp_path / "bin")}, "13.2").home == home


def test_the_compiler_of_pypi_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = make_toolkit(tmp_path / "nvidia" / "cu13")
    (tmp_path / "nvidia" / "cudnn").mkdir()
    monkeypatch.setattr(tools.importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path / name)]))
    monkeypatch.setattr(tools, "Path", lambda *parts: Path("/nonexistent") if parts == ("/usr/local/cuda/bin/nvcc",) else Path(*parts))
    assert tools.find_toolkit({"PATH": ""}, "13.0").home == home
    (home / "nvvm" / "bin" / "cicc").unlink()
    with pytest.raises(tools.ToolkitError, match=r"lacks nvvm/bin/cicc; .*nvidia-nvvm==13"):
        tools.find_toolkit({"PATH": ""}, "13.0")


def test_a_compiler_of_another_major_version_is_refused(tmp_path: Path) -> None:
    home = make_toolkit(tmp_path / "cuda", "12.8")
    with pytest.raises(tools.ToolkitError, match=r"^torch was built for CUDA 13\.0, the nvcc in .* is of CUDA 12\.8: their major versions"):
        tools.find_toolkit({"CUDA_HOME": str(home)}, "13.0")
    assert tools.find_toolkit({"CUDA_HOME": str(home)}, "12.4").version == (12, 8)


def test_a_compiler_that_does_not_run_is_refused(tmp_path: Path) -> None:
    home = make_toolkit(tmp_path / "cuda")
    write_program(home / "bin" / "nvcc", "echo cannot run >&2; exit 1")
    with pytest.raises(tools.ToolkitError, match="names no release: cannot run"):
        tools.find_toolkit({"CUDA_HOME": str(home)}, "13.0")


# For which GPUs


@pytest.mark.parametrize(
    ("wish", "known", "visible", "archs"),
    [
        (None, KNOWN, [], ["7.5", "8.0", "8.6", "9.0", "10.0", "12.0+PTX"]),
        ("", KNOWN, ["9.0"], ["7.5", "8.0", "8.6", "9.0", "10.0", "12.0+PTX"]),
        (None, KNOWN[:5], [], ["7.5", "8.0", "8.6", "9.0+PTX"]),
        ("9.0", KNOWN, [], ["9.0"]),
        ("7.0 7.5;8.6 9.0+PTX", KNOWN, [], ["7.5", "8.6", "9.0+PTX"]),
        ("9.0a", KNOWN, [], ["9.0a"]),
        ("native", KNOWN, ["9.0", "8.6", "9.0"], ["8.6", "9.0"]),
    ],
)
def test_archs_are_those_asked_for_or_all(wish: str | None, known: list[str], visible: list[str], archs: list[str]) -> None:
    assert tools.choose_archs(wish, known, visible) == archs


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        ("Ampere", "expected TORCH_CUDA_ARCH_LIST to be compute capabilities such as 8.0;9.0.PTX, got 'Ampere'"),
        ("13.9", "this nvcc cannot compile for compute capability 13.9; it knows 7.5, 8.0"),
        ("6.1;7.0", "need compute capability 7.5 or newer; TORCH_CUDA_ARCH_LIST is '6.1;7.0'"),
        ("native", "no GPU is visible"),
    ],
)
def test_archs_that_cannot_be_are_refused(wish: str, sentence: str) -> None:
    with pytest.raises(tools.ToolkitError, match=sentence):
        tools.choose_archs(wish, KNOWN)
    with pytest.raises(tools.ToolkitError, match="compiles for none of"):
        tools.choose_archs(None, ["5.0"])


def test_flags_name_machine_code_and_ptx() -> None:
    assert tools.gencode_flags(["8.0", "12.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


# setup.py


def extensions(monkeypatch: pytest.MonkeyPatch, wish: str, home: str | None = None) -> list[Any]:
    """What setup.py would build."""
    monkeypatch.setenv("PATCHCORE_EXT_CUDA", wish)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("CUDA_HOME", home)
    extensions: list[Any] = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["extensions"]()
    return extensions


def test_one_without_a_compiler_is_an_error_that_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="PATCHCORE_EXT_CUDA=1, but (nvcc was not found; set CUDA_HOME|this torch was built without CUDA)"):
        extensions(monkeypatch, "1", "/nonexistent")


def test_auto_without_a_compiler_builds_for_the_cpu_and_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert [extension.name for extension in extensions(monkeypatch, "auto", "/nonexistent")] == ["patchcore_ext._C"]
    assert "setup.py: no CUDA kernels: " in capsys.readouterr().out


def test_a_torch_without_cuda_builds_for_the_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert [extension.name for extension in extensions(monkeypatch, "auto")] == ["patchcore_ext._C"]
    assert "this torch was built without CUDA" in capsys.readouterr().out


def test_an_unknown_wish_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="expected PATCHCORE_EXT_CUDA to be auto, 0 or 1, got 'yes'"):
        extensions(monkeypatch, "yes")


def test_with_a_compiler_all_kernels_are_built_for_all_archs(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        tools.find_toolkit(cuda_of_torch=torch.version.cuda or "none")
    except tools.ToolkitError as error:
        pytest.skip(f"the CUDA build was not looked at: {error}")
    _, cuda = extensions(monkeypatch, "1", str(tools.find_toolkit().home))
    assert cuda.name == "patchcore_ext._C_cuda"
    assert set(cuda.sources) >= {str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "core" / "cuda").glob("*.cu")}
    flags = cuda.extra_compile_args["nvcc"]
    assert {"--fmad=false", "-std=c++17", "-Xfatbin=-compress-all", "-gencode=arch=compute_75,code=sm_75"} <= set(flags)
    assert "-gencode=arch=compute_120,code=compute_120" in flags
    assert ("USE_CUDA", None) in cuda.define_macros


BUILD = """
import runpy, sys
sys.modules["pybind11"] = None  # importing it fails
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def built_without_nvcc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built with PATCHCORE_EXT_CUDA=0, without nvcc on PATH and without the pybind11 package; unoptimised, which is quick."""
    place = tmp_path_factory.mktemp("built")
    programs = {name: shutil.which(name) for name in ("c++", "g++", "gcc", "cc", "as", "ld", "ar", "ninja")}
    if programs["c++"] is None or programs["g++"] is None:
        pytest.skip("there is no C++ compiler: the build without nvcc was not tried")
    for name, path in programs.items():
        if path is not None:
            (place / "bin").mkdir(exist_ok=True)
            (place / "bin" / name).symlink_to(path)
    write_program(place / "cxx", f'exec {programs["c++"]} "$@" -O0')
    removed = ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CFLAGS", "CXXFLAGS")
    environment = {key: value for key, value in os.environ.items() if key not in removed}
    environment |= {"PATCHCORE_EXT_CUDA": "0", "PATH": str(place / "bin"), "CXX": str(place / "cxx"), "MAX_JOBS": "2"}
    arguments = ["-q", "build_ext", "--build-lib", str(place / "lib"), "--build-temp", str(place / "temp")]
    result = subprocess.run([sys.executable, "-c", BUILD, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    for path in (ROOT / "patchcore_ext").rglob("*.py"):
        target = place / "lib" / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return place / "lib"


def test_zero_builds_without_nvcc_what_works_on_the_cpu(built_without_nvcc: Path) -> None:
    assert not list((built_without_nvcc / "patchcore_ext").glob("_C_cuda*"))
    code = f"""
import sys
sys.path.insert(0, {str(built_without_nvcc)!r})
import torch, patchcore_ext
from patchcore_ext import ops
assert patchcore_ext.__file__.startswith({str(built_without_nvcc)!r})
distances, indices = ops.nearest_neighbors(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]]), 1)
print(distances.flatten().tolist(), indices.flatten().tolist(), patchcore_ext.build_info()["cuda_problem"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=built_without_nvcc)
    assert result.stdout.strip() == "[1.0] [1] this build has no CUDA kernels", result.stderr


def test_the_kernels_tests_compile_for_a_gpu_as_well() -> None:
    """As make gpu-test compiles them: only the C++ compiler and the toolkit's headers are needed to find out."""
    try:
        toolkit = tools.find_toolkit()
    except tools.ToolkitError as error:
        pytest.skip(f"no CUDA toolkit: {error}")
    programs = _load("gpu_programs")
    steps = programs.gpu_steps(ROOT / "build", toolkit, ["9.0"])
    names = {source.stem for source in programs.test_sources(programs.ONLY_SIMT)}
    commands = [step.command for step in steps if Path(step.command[-3]).stem in names]
    assert len(commands) == len(names) == 3
    for command in commands:
        result = subprocess.run([*command[:-2], "-fsyntax-only"], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
