"""The CUDA bindings and what Python does for them, without a GPU: test_cuda.py in a build whose ops run the CUDA sources on the CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_cuda_ops_run_on_the_cpu() -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ was not found: the CUDA ops were not run on the CPU")
    folder = ROOT / "build" / "simt-package"
    subprocess.run([sys.executable, str(ROOT / "tools" / "simt_package.py"), str(folder)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "python_tests" / "test_cuda.py")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-6000:]
    assert "passed" in done.stdout
