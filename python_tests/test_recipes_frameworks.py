"""docs/recipes for other frameworks: the Python blocks of a page run one after the other, in a folder with made-up images and weights.

The blocks of cpp.md are built and run by test_cpp_example.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torchvision
from small_model import images_of, write_images

RECIPES = Path(__file__).parents[1] / "docs" / "recipes"
PAGES = {"scikit-learn": (), "faiss": ("faiss",), "torch": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what the pages speak of: bottle/ in MVTec AD's layout and resnet18.pth."""
    write_images(tmp_path / "bottle" / "train" / "good", images_of(21, 0, 64, 64))
    write_images(tmp_path / "bottle" / "test" / "good", images_of(2, 7, 64, 64))
    write_images(tmp_path / "bottle" / "test" / "broken", images_of(2, 8, 64, 64, defect=True))
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page: str, workplace: Path) -> None:
    for package in PAGES[page]:
        pytest.importorskip(package, reason=f"{package} is not installed: docs/recipes/{page}.md did not run")
    text = (RECIPES / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert blocks
    assert {language for language, _ in blocks} == {"python"}  # a block of another kind would not be run
    namespace: dict[str, object] = {"__name__": f"recipe_{page}"}
    for _, block in blocks:
        exec(compile(block, f"{page}.md", "exec"), namespace)
