"""The peers' own test files, run on our parts: patchcore-inspection's and anomalib's.

They are not copied here. PATCHCORE_INSPECTION_SRC names a checkout of amazon-science/patchcore-inspection (test/test_sampler.py, test/test_common.py and
test/test_patchcore.py; written against commit fcaa92f), ANOMALIB_TESTS the folder ``tests`` of a checkout of anomalib (unit/models/components/sampling/
test_k_center_greedy.py and unit/models/image/anomaly_dino/test_torch_model.py; written against 2.7.0). Each file is run in a process of its own, with names
of the peer replaced by ours; of patchcore-inspection's the marks that skip without a GPU are taken off, since they say nothing about our samplers.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CUDA_MARK = re.compile(r'^@pytest\.mark\.skipif\(not torch\.cuda\.is_available\(\), reason="[^"]*"\)\n', flags=re.MULTILINE)
OUR_NAMES_IN_PATCHCORE = """
import sys
sys.path.insert(0, {source!r})
from patchcore_ext.integrations import patchcore_inspection as ours
import patchcore.common, patchcore.sampler
for name in ("BaseSampler", "IdentitySampler", "GreedyCoresetSampler", "ApproximateGreedyCoresetSampler", "RandomSampler"):
    setattr(patchcore.sampler, name, getattr(ours, name))
theirs, patchcore.common.FaissNN = patchcore.common.FaissNN, ours.FaissNN
patchcore.common.NearestNeighbourScorer.__init__.__defaults__ = (ours.FaissNN(False, 4),)  # made of theirs while it was imported
import patchcore.patchcore  # its own defaults are made of ours

def pytest_sessionfinish(session, exitstatus):
    assert patchcore.common.FaissNN is ours.FaissNN and patchcore.sampler.IdentitySampler is ours.IdentitySampler
"""
DINO_WITHOUT_WEIGHTS = """
import pytest

@pytest.fixture(autouse=True)
def random_weights(monkeypatch):
    from anomalib.models.components import TimmFeatureExtractor
    from anomalib.models.image.anomaly_dino import torch_model
    monkeypatch.setattr(torch_model, "TimmFeatureExtractor", lambda **options: TimmFeatureExtractor(**{**options, "pre_trained": False}))
"""


def folder_named_by(variable: str, missing: str) -> Path:
    """The folder that an environment variable names; skips, loudly, when there is none."""
    folder = os.environ.get(variable)
    if not folder or not Path(folder).is_dir():
        pytest.skip(f"{variable} does not name a folder: {missing} did not run on our parts")
    return Path(folder).resolve()


def run_on_ours(test_file: Path, text: str, conftest: str, folder: Path) -> str:
    """Runs a test file in a process of its own; what pytest says."""
    (folder / "conftest.py").write_text(conftest, encoding="utf-8")
    (folder / test_file.name).write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", f"--rootdir={folder}", test_file.name],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{test_file}:\n{done.stdout[-6000:]}{done.stderr[-3000:]}"
    return done.stdout


def passed(said: str) -> int:
    """How many tests passed; none may have been skipped."""
    assert "skipped" not in said
    found = re.search(r"(\d+) passed", said)
    assert found is not None, said
    return int(found[1])


@pytest.mark.parametrize(("name", "count"), [("test_sampler.py", 6), ("test_common.py", 8), ("test_patchcore.py", 4)])
def test_patchcore_inspection(name: str, count: int, tmp_path: Path) -> None:
    checkout = folder_named_by("PATCHCORE_INSPECTION_SRC", f"patchcore-inspection's {name}")
    for package in ("faiss", "timm"):
        pytest.importorskip(package, reason=f"{package} is not installed, and patchcore-inspection imports it: its {name} did not run on our parts")
    test_file = checkout / "test" / name
    text = CUDA_MARK.sub("", test_file.read_text(encoding="utf-8"))
    assert "skipif" not in text
    assert passed(run_on_ours(test_file, text, OUR_NAMES_IN_PATCHCORE.format(source=str(checkout / "src")), tmp_path)) >= count


def anomalibs_test(name: str) -> Path:
    tests = folder_named_by("ANOMALIB_TESTS", f"anomalib's {Path(name).name}")
    if importlib.util.find_spec("anomalib") is None:
        pytest.skip(f"anomalib is not installed: its {Path(name).name} did not run on our parts")
    return tests / name


def test_anomalib_sampler(tmp_path: Path) -> None:
    test_file = anomalibs_test("unit/models/components/sampling/test_k_center_greedy.py")
    line = "from anomalib.models.components.sampling.k_center_greedy import KCenterGreedy\n"
    text = test_file.read_text(encoding="utf-8")
    assert line in text
    text = text.replace(line, "from patchcore_ext.integrations.anomalib import KCenterGreedy\n")
    assert passed(run_on_ours(test_file, text, "", tmp_path)) >= 7


def test_anomalib_dino(tmp_path: Path) -> None:
    test_file = anomalibs_test("unit/models/image/anomaly_dino/test_torch_model.py")
    conftest = f"from patchcore_ext.integrations.anomalib import accelerate\naccelerate()\n{DINO_WITHOUT_WEIGHTS}"
    assert passed(run_on_ours(test_file, test_file.read_text(encoding="utf-8"), conftest, tmp_path)) >= 8


def test_patchcore_inspection_example(tmp_path: Path) -> None:
    checkout = folder_named_by("PATCHCORE_INSPECTION_SRC", "the example for patchcore-inspection")
    for package in ("faiss", "timm"):
        pytest.importorskip(package, reason=f"{package} is not installed, and patchcore-inspection imports it: the example did not run")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "examples" / "patchcore_inspection.py"), "--images", "2"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{checkout / 'src'}", "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    difference = re.search(r"largest difference of a score: (\S+) of", done.stdout)
    assert difference is not None, done.stdout
    assert float(difference[1]) < 1e-3
