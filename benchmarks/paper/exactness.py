"""Same picks, scores and AUROC on every instruction set and number of threads; and how far greedy selection in float32 drifts from them.

Each variant runs in a process of its own: ``python -m benchmarks.paper.exactness JSON``.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import patchcore_ext
from patchcore_ext import CoresetSampler, PatchScorer
from patchcore_ext.memory_bank import atomic_write
from patchcore_ext.metrics import image_auroc

from .. import coreset_methods
from ..harness import run_worker
from .maps import digest_of
from .rows import ROWS
from .study import Study

NOMINAL, TESTED = 200, 100  # images, evenly from beginning to end
RATIO = 0.01
_SIDE_BY_SIDE = 2  # variants: some have one thread only, and all of them start and load alone
FLOAT32: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "float32, sum of squared differences, C++": coreset_methods.plain_loop,
    "float32, |a|^2 + |b|^2 - 2ab, torch": coreset_methods.torch_expanded,
}


def compare(study: Study, out: Path) -> list[dict[str, Any]]:
    """A line for each variant; those of a finished run are taken over."""
    item = study.dataset.classes[0]
    case = study.case(ROWS["patchcore-1"], item, 0)
    labels = {image.path: image.is_defective for image in item.test}
    train, test = (replace(part, paths=_evenly(part.paths, count)) for part, count in ((case.train, NOMINAL), (case.test, TESTED)))
    digest = digest_of([train.key(), test.key(), RATIO, patchcore_ext.__version__])
    kept = out / "rows" / "exactness.json"
    if kept.exists() and (stored := json.loads(kept.read_text(encoding="ascii")))["digest"] == digest:
        return list(stored["lines"])
    files = {name: str(out / "cache" / f"exactness_{name}.npy") for name in ("train", "test", "labels")}
    np.save(files["train"], train.rows().numpy())
    np.save(files["test"], test.rows().numpy())
    np.save(files["labels"], np.array([labels[path] for path in test.paths]))
    lines = list(_variants({**files, "num_patches": case.num_patches}))
    for name in ("train", "test"):
        Path(files[name]).unlink()
    kept.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(kept) as temporary:
        temporary.write_text(json.dumps({"digest": digest, "lines": lines}) + "\n", encoding="ascii")
    return lines


def _variants(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    best, *others = patchcore_ext.build_info()["cpu_levels"][::-1]
    turns = [("exact", best, 2), ("exact", best, 1), *(("exact", level, 2) for level in others)]
    turns += [(name, None, 2) for name in FLOAT32]
    first: dict[str, Any] | None = None

    def run(turn: tuple[str, str | None, int]) -> dict[str, Any]:
        method, level, threads = turn
        environment = {"OMP_NUM_THREADS": str(threads), **({} if level is None else {"PATCHCORE_EXT_CPU_LEVEL": level})}
        return run_worker(sys.executable, "benchmarks.paper.exactness", {**arguments, "method": method, "threads": threads}, environment)

    with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
        results = list(pool.map(run, turns))
    for (method, level, threads), found in zip(turns, results, strict=True):
        name = f"exact, {level}, {threads} thread{'s' * (threads > 1)}" if level else method
        if "error" in found:
            yield {"variant": name, "error": found["error"]}
            continue
        first = first or found
        yield {
            "variant": name,
            "picks": len(found["picks"]),
            "picks_in_other_places": sum(a != b for a, b in zip(found["picks"], first["picks"], strict=True)),
            "other_rows": len(set(found["picks"]) - set(first["picks"])),
            "scores_sha256": found["scores_sha256"],
            "same_scores": found["scores_sha256"] == first["scores_sha256"],
            "image_auroc": found["image_auroc"],
        }


def markdown(lines: list[dict[str, Any]]) -> str:
    """The table."""
    made = ["| selection and scoring | picks | in other places | other rows | scores | image AUROC |", "|---|---|---|---|---|---|"]
    for line in lines:
        variant = line["variant"].replace("|", "\\|")
        if "error" in line:
            made.append(f"| {variant} | not run: {line['error']} | | | | |")
            continue
        scores = "the same bits" if line["same_scores"] else "others"
        counts = f"{line['picks']:,} | {line['picks_in_other_places']:,} | {line['other_rows']:,}"
        made.append(f"| {variant} | {counts} | {scores} ({line['scores_sha256'][:12]}) | {line['image_auroc']!r} |")
    return "\n".join(made)


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """Picks of 1%, and the scores and AUROC that they give."""
    train, test = (torch.from_numpy(np.load(arguments[name])) for name in ("train", "test"))
    sampler = CoresetSampler(RATIO, seed=0, progress=False)
    if arguments["method"] == "exact":
        picks = sampler.select(train).indices
    else:
        first = CoresetSampler(num_samples=1, seed=0, progress=False).select(train).indices
        picks = FLOAT32[arguments["method"]](sampler._project(train), max(1, int(RATIO * len(train))), int(first))
    patches = test.view(-1, arguments["num_patches"], test.shape[1])
    scorer = PatchScorer(train[picks])
    scores = [scorer(part) for part in patches.split(16)]
    images = torch.cat([part.image_scores for part in scores])
    digest = hashlib.sha256(images.numpy().tobytes())
    digest.update(torch.cat([part.patch_distances for part in scores]).numpy().tobytes())
    return {"picks": picks.tolist(), "scores_sha256": digest.hexdigest(), "image_auroc": image_auroc(np.load(arguments["labels"]), images.numpy())}


def _evenly(paths: tuple[str, ...], count: int) -> tuple[str, ...]:
    return paths if len(paths) <= count else tuple(paths[i * len(paths) // count] for i in range(count))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    with torch.inference_mode():
        print(json.dumps(measure(given)))
