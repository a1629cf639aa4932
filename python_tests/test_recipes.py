"""Every block of Python in docs/recipes runs, page by page, in a process of its own; so does the README's way in for users of anomalib.

A page names the packages it needs in its first line, ``<!-- needs: NAME NAME -->``, and is skipped where one is missing. Its blocks run in order, in a folder
with images of good and broken bottles in MVTec AD's layout and a file of weights. Networks get random weights: the tests fetch nothing. The blocks of cpp.md,
which has none of Python, are built and run by test_cpp_example.py.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = sorted(page for page in (ROOT / "docs" / "recipes").glob("*.md") if page.stem != "cpp")
BLOCK = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)
WITHOUT_WEIGHTS = """
import functools, importlib.util, warnings
warnings.filterwarnings("ignore")
if importlib.util.find_spec("timm") is not None:
    import timm
    timm.create_model = functools.partial(lambda make, *names, **options: make(*names, **{**options, "pretrained": False}), timm.create_model)
"""
ANOMALIB_SCRIPT = """
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Patchcore
from patchcore_ext.integrations.anomalib import sampler
bottle = Folder(name="bottle", root="bottle", normal_dir="train/good", normal_test_dir="test/good", abnormal_dir="test/broken", num_workers=0)
model, engine = Patchcore(backbone="resnet18"), Engine(default_root_dir="results")
selections = []
select = sampler.CoresetSampler.select
sampler.CoresetSampler.select = lambda *arguments, **options: selections.append(1) or select(*arguments, **options)
"""


def import_path() -> list[str]:
    """Where this package is, and the checkout that PATCHCORE_INSPECTION_SRC names."""
    checkout = os.environ.get("PATCHCORE_INSPECTION_SRC")
    return [str(ROOT), *([str(Path(checkout).resolve() / "src")] if checkout else [])]


def is_missing(package: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    with monkeypatch.context() as context:
        context.setattr(sys, "path", [*sys.path, *import_path()])
        return importlib.util.find_spec(package) is None


def make_bottles(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for part, count in (("train/good", 21), ("test/good", 3), ("test/broken", 3)):
        (folder / "bottle" / part).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(90, 120, (64, 64, 3), dtype=np.uint8)
            if part == "test/broken":
                pixels[20:40, 20:40] = 250
            Image.fromarray(pixels).save(folder / "bottle" / part / f"{i:03}.png")


def run(code: str, folder: Path) -> None:
    make_bottles(folder)
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), folder / "resnet18.pth")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(import_path()), "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_of_a_recipe_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    needs = re.match(r"<!-- needs: ([\w ]+) -->", text)
    for package in needs[1].split() if needs else []:
        if is_missing(package, monkeypatch):
            pytest.skip(f"{package} is not installed: the blocks of docs/recipes/{page.name} did not run")
    blocks = BLOCK.findall(text)
    assert blocks, f"{page.name} has no block of Python"
    assert len(blocks) == text.count("```") // 2, f"{page.name} has a block of another kind, which would not be run"
    run(WITHOUT_WEIGHTS + "\n".join(blocks), tmp_path)


def test_the_way_in_for_users_of_anomalib_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [block for block in BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8")) if "anomalib" in block]
    assert len(blocks) == 1
    assert sum(bool(line.strip()) for line in blocks[0].splitlines()) == 3
    if is_missing("anomalib", monkeypatch):
        pytest.skip("anomalib is not installed: the README's three lines for its users did not run")
    run(f"{WITHOUT_WEIGHTS}{ANOMALIB_SCRIPT}\n{blocks[0]}\nassert selections and len(model.model.memory_bank)", tmp_path)
