"""The machine code that nvcc makes of the CUDA kernels, held against what their sources promise. No GPU is needed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import sass
from cuda_toolkit import ToolkitError, find_toolkit

# Kernels whose work is integer products on tensor cores, and the files they are in; all others must do without.
MMA_KERNELS = {"contract_kernel", "edges_kernel", "update_kernel", "near_codes_kernel", "nearest_kernel", "trial_kernel"}
MMA_FILES = ("nearest.cu", "seeds.cu", "coreset.cu", "update.cu", "codes.cu")
# The oldest, the one of most cards, and Hopper.
ARCHS = ("7.5", "8.0", "9.0")


@pytest.fixture(scope="module")
def kernels() -> list[sass.Kernel]:
    """Every kernel for 8.0, those with tensor products for the other archs as well."""
    try:
        toolkit = find_toolkit()
        files = sorted(path.name for path in sass.CUDA.glob("*.cu"))
        jobs = [(name, arch) for name in MMA_FILES for arch in ARCHS]
        return sass.compile_kernels([*jobs, *((name, "8.0") for name in files if name not in MMA_FILES)], toolkit)
    except ToolkitError as error:
        if "was not found" in str(error):
            pytest.skip(f"the machine code of the CUDA kernels was not looked at: {error}")
        raise


def having_code(kernels: list[sass.Kernel]) -> list[sass.Kernel]:
    if not any(kernel.functions for kernel in kernels):
        pytest.skip("the instructions of the CUDA kernels were not looked at: nvdisasm is in neither the CUDA toolkit nor Triton")
    return kernels


def test_every_kernel_is_compiled(kernels: list[sass.Kernel]) -> None:
    for name in {kernel.source for kernel in kernels}:
        declared = set(sass.most_registers(name, "8.0"))
        assert declared == {kernel.name for kernel in kernels if kernel.source == name and kernel.arch == "8.0"}, name


def test_tensor_products_are_where_they_belong(kernels: list[sass.Kernel]) -> None:
    for arch in ARCHS:
        having = {kernel.name for kernel in having_code(kernels) if kernel.arch == arch and kernel.count("IMMA") > 0}
        assert having == MMA_KERNELS, arch


def test_kernels_with_tensor_products_do_not_spill(kernels: list[sass.Kernel]) -> None:
    spilling = {(kernel.label, kernel.arch): kernel.spill_stores + kernel.spill_loads for kernel in kernels if kernel.name in MMA_KERNELS}
    assert {kernel: spilled for kernel, spilled in spilling.items() if spilled > 0} == {}


def test_registers_leave_room_for_the_blocks_that_launch_bounds_promise(kernels: list[sass.Kernel]) -> None:
    for kernel in kernels:
        assert 0 < kernel.registers <= sass.most_registers(kernel.source, kernel.arch)[kernel.name], (kernel.label, kernel.arch)
    assert sass.most_registers("nearest.cu", "9.0")["nearest_kernel"] == 128, "two blocks of 256 threads a multiprocessor"


def test_all_shared_memory_is_dynamic(kernels: list[sass.Kernel]) -> None:
    assert [(kernel.label, kernel.arch) for kernel in kernels if kernel.static_shared > 0] == []


def test_canonical_distances_are_not_fused(kernels: list[sass.Kernel]) -> None:
    """A fused multiply-add rounds once where the exactness contract rounds twice. Roots and quotients are made of them, so the whole kernel may hold some."""
    users = [kernel for kernel in having_code(kernels) if kernel.count("", "half_warp_distance") > 0]
    assert {"nearest_kernel", "update_kernel", "edges_kernel", "scores_kernel"} <= {kernel.name for kernel in users}
    for kernel in users:
        assert kernel.count("DMUL", "half_warp_distance") > 0
        assert kernel.count("DFMA", "half_warp_distance") == kernel.count("FFMA", "half_warp_distance") == 0, (kernel.label, kernel.arch)
    (project,) = (kernel for kernel in kernels if kernel.name == "project_kernel")
    assert project.count("DMUL") > 0
    assert project.count("DFMA") == 0


# The reading itself


def test_the_output_of_the_assembler_is_read() -> None:
    log = """
ptxas info    : Compiling entry function '_ZN3a_b9my_kernelINS_4ScanILi64EEEEEvi' for 'sm_80'
ptxas info    : Function properties for _ZN3a_b9my_kernelINS_4ScanILi64EEEEEvi
    24 bytes stack frame, 20 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 12 bytes smem, 416 bytes cmem[0]
ptxas info    : Function properties for helper
    8 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
"""
    (kernel,) = sass.parse_assembler(log, "a.cu", "8.0")
    assert (kernel.name, kernel.label) == ("my_kernel", "my_kernel<64>")
    assert (kernel.registers, kernel.spill_stores, kernel.spill_loads, kernel.static_shared) == (128, 24, 16, 12)


def test_a_disassembly_is_read() -> None:
    code = """
\t.section\t.text.first_kernel,"ax",@progbits
.text.first_kernel:
        /*0000*/                   IMMA.16832.S8.S8 R8, R4.ROW, R2.COL, R8 ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
$first_kernel$helper:
        /*0020*/                   DFMA R8, -R8, R24, 1 ;
\t.section\t.text.second_kernel,"ax",@progbits
        /*0000*/              @UP1 UMOV UR4, 0x0 ;
"""
    read = sass.parse_code(code)
    kernel = sass.Kernel("a.cu", "8.0", "first_kernel", functions=read["first_kernel"])
    assert (kernel.count(""), kernel.count("IMMA"), kernel.count("DFMA"), kernel.count("DFMA", "helper"), kernel.count("IMMA", "helper")) == (3, 1, 1, 1, 0)
    assert dict(read["second_kernel"]["second_kernel"]) == {"UMOV": 1}


def test_launch_bounds_are_read_from_the_source() -> None:
    assert sass.evaluate("kA * 32 / 2", {"kA": 8}) == 128
    assert sass.evaluate("kUnknown", {}) is None
    assert sass.constants("nearest.cu", "8.0")["kThreads"] == 256
    assert sass.most_registers("coreset.cu", "8.0")["pick_kernel"] == 64


def test_conditions_on_the_arch_are_followed(tmp_path: Path) -> None:
    source = tmp_path / "a.cu"
    source.write_text(
        "#ifdef A\n#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800\nold\n#else\nnew\n#endif\nboth\n#endif\n#if __CUDA_ARCH__ >= 900\nhopper\n#endif\n"
    )
    assert [sass.text_for(source, arch).split() for arch in ("7.5", "8.0", "9.0")] == [["old", "both"], ["new", "both"], ["new", "both", "hopper"]]
