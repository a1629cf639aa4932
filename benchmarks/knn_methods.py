"""All methods on one case, in turns, in one process: ``python -m benchmarks.knn_methods JSON`` prints what they took.

``"task": "search"``: nearest neighbours, first compared with every distance in float64. ``"task": "scoring"``: image score and anomaly map from patch features,
and the networks that such features come from; runs in the environment of anomalib where there is one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Search = Callable[[Tensor], Tensor]  # queries [Q, D] to indices [Q, k]
BLOCK_BYTES = 256 << 20  # of a distance matrix
SLOW_SECONDS, SLOW_REPEATS = 2.0, 3
PATCHES, GRID, SIZE = 28 * 28, (28, 28), (224, 224)
PAUSE_SECONDS = 0.02  # between two methods: threads of the one, which wait busily for more work, are asleep when the other starts
INSTALL = {"faiss": "faiss-cpu", "sklearn": "scikit-learn"}


def ours(bank: Tensor, k: int, threads: int) -> Search:
    """A prepared bank."""
    from patchcore_ext import ops

    prepared = ops.prepare_bank(bank)
    return lambda queries: ops.nearest_neighbors(queries, bank, k, prepared)[1]


def ours_one_call(bank: Tensor, k: int, threads: int) -> Search:
    """Without a prepared bank."""
    from patchcore_ext import ops

    return lambda queries: ops.nearest_neighbors(queries, bank, k)[1]


def _faiss_search(index: Any, k: int) -> Search:
    return lambda queries: torch.from_numpy(index.search(queries.numpy(), k)[1])


def faiss_flat(bank: Tensor, k: int, threads: int) -> Search:
    """IndexFlatL2."""
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatL2(bank.shape[1])
    index.add(bank.numpy())
    return _faiss_search(index, k)


def faiss_hnsw(bank: Tensor, k: int, threads: int) -> Search:
    """IndexHNSWFlat, M = 32, efSearch = 64: approximate."""
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexHNSWFlat(bank.shape[1], 32)
    index.add(bank.numpy())
    index.hnsw.efSearch = 64
    return _faiss_search(index, k)


def faiss_ivfpq(bank: Tensor, k: int, threads: int) -> Search:
    """IndexIVFPQ, sqrt(M) lists of which 16 are probed, 8 dimensions a byte: approximate."""
    import faiss

    faiss.omp_set_num_threads(threads)
    rows, dim = bank.shape
    index = faiss.IndexIVFPQ(faiss.IndexFlatL2(dim), dim, round(rows**0.5), dim // 8, 8)
    index.train(bank.numpy())
    index.add(bank.numpy())
    index.nprobe = 16
    return _faiss_search(index, k)


def sklearn_brute(bank: Tensor, k: int, threads: int) -> Search:
    """NearestNeighbors(algorithm="brute")."""
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(bank.numpy())
    return lambda queries: torch.from_numpy(index.kneighbors(queries.numpy(), return_distance=False))


def _smallest(distances: Tensor, k: int) -> Tensor:
    return distances.min(1).indices[:, None] if k == 1 else distances.topk(k, dim=1, largest=False).indices


def _in_blocks(bank: Tensor, search: Search) -> Search:
    """Blocks of queries whose distance matrix takes at most BLOCK_BYTES."""
    block = max(1, BLOCK_BYTES // (4 * len(bank)))
    return lambda queries: torch.cat([search(part) for part in queries.split(block)])


def torch_matmul(bank: Tensor, k: int, threads: int) -> Search:
    """|b|^2 - 2 ab, which orders rows as the distance does; min for k = 1, which is faster than topk."""
    norms = bank.square().sum(1)
    return _in_blocks(bank, lambda queries: _smallest(torch.addmm(norms, queries, bank.T, alpha=-2), k))


def torch_cdist(bank: Tensor, k: int, threads: int) -> Search:
    """torch.cdist, which is a matrix product at these sizes."""
    return _in_blocks(bank, lambda queries: _smallest(torch.cdist(queries, bank), k))


SEARCHES = {function.__name__: function for function in (ours, ours_one_call, faiss_flat, sklearn_brute, torch_matmul, torch_cdist, faiss_hnsw, faiss_ivfpq)}


def without(error: Exception) -> str:
    """What to tell where a method cannot run."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name} is not installed (pip install {INSTALL.get(error.name, error.name)})"
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)


def load(arguments: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """The bank [M, D], and the queries of each call: those of ``images`` images, as often as there are more, at most as many as there are calls."""
    rows = np.load(arguments["rows"], mmap_mode="r")
    count = arguments["bank_rows"]
    taken = rows[:count] if arguments["picks"] is None or count == len(rows) else rows[np.load(arguments["picks"])[:count]]
    queries = np.load(arguments["queries"])
    bank, asked = (torch.from_numpy(np.array(part + np.float32(arguments["offset"]), np.float32, order="C")) for part in (taken, queries))
    batches = asked.split(min(len(asked), arguments["images"] * PATCHES))
    return bank, list(batches[: arguments["repeats"] * calls_of_a_run(arguments)])


def calls_of_a_run(arguments: dict[str, Any]) -> int:
    """Of single images, a good one and a defective one make a run: they take different times, and the median of both kinds would lie anywhere between."""
    return 2 if arguments["images"] == 1 else 1


def sample_rows(count: int) -> Tensor:
    """At most PATCHES of so many rows, evenly."""
    return torch.arange(min(count, PATCHES)) * count // min(count, PATCHES)


def check_ours(bank: Tensor, batches: list[Tensor], k: int) -> tuple[str | None, Tensor, Tensor]:
    """What differs from every distance in float64 or None, and of a sample of the queries: their rows and exact squared distances [n, k].

    Ours searches with a prepared bank and without one, each batch as it will be timed.
    """
    from patchcore_ext import ops

    asked = torch.cat(batches)
    rows = sample_rows(len(asked))
    exact, indices = torch.ops.patchcore_ext.nearest_neighbors(asked[rows], bank, k, None)
    for name, prepared in (("ours", ops.prepare_bank(bank)), ("ours, one call", [])):
        found = [ops.nearest_neighbors(batch, bank, k, prepared) for batch in batches]
        wrong = (torch.cat([part[0] for part in found])[rows] != exact) | (torch.cat([part[1] for part in found])[rows] != indices)
        if wrong.any():
            return f"{name} differs from every distance in float64 at {int(wrong.any(1).sum())} of {len(rows)} queries", rows, exact
    return None, rows, exact


def wrong_share(search: Search, queries: Tensor, bank: Tensor, exact: Tensor) -> float:
    """Share of queries whose first row is farther than the nearest one; an equally distant row is not wrong."""
    from patchcore_ext import reference

    nearest = search(queries)[:, 0]
    distances = reference.squared_distance(queries, bank[nearest.clamp(min=0)])
    return float(((distances > exact[:, 0]) | (nearest < 0)).double().mean())


Times = dict[str, float]  # of the parts of a call


def in_turns(calls: dict[str, Callable[[int], Times]], arguments: dict[str, Any]) -> dict[str, list[Times]]:
    """Runs of every method, called with the number of the call, again and again in turns; of slow ones at most SLOW_REPEATS runs.

    A run is the mean of ``calls_of_a_run``, which do not follow each other: other methods empty the caches between them, as a network would.
    """
    a_run = calls_of_a_run(arguments)
    results: dict[str, list[Times]] = {name: [] for name in calls}
    slow: set[str] = set()
    for number in range(arguments["repeats"] * a_run):
        for name, call in calls.items():
            if name in slow and number >= SLOW_REPEATS * a_run:
                continue
            time.sleep(PAUSE_SECONDS)
            started = time.perf_counter()
            results[name].append(call(number))
            if time.perf_counter() - started > SLOW_SECONDS:
                slow.add(name)
    return {name: [_mean(found[i : i + a_run]) for i in range(0, len(found), a_run)] for name, found in results.items()}


def _mean(times: list[Times]) -> Times:
    return {part: sum(one[part] for one in times) / len(times) for part in times[0]}


def search(arguments: dict[str, Any]) -> dict[str, Any]:
    """Checks ours, builds every method, counts its wrong rows, and times all in turns."""
    from patchcore_ext import PatchScorer

    bank, batches = load(arguments)
    problem, rows, exact = check_ours(bank, batches, arguments["k"])
    if problem is not None:
        return {"mismatch": problem}
    sample = torch.cat(batches)[rows]
    methods: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[int], Times]] = {}
    for name in arguments["methods"]:
        started = time.perf_counter()
        try:
            method = SEARCHES[name](bank, arguments["k"], arguments["threads"])
            build_seconds = time.perf_counter() - started
            methods[name] = {"build_seconds": build_seconds, "wrong": wrong_share(method, sample, bank, exact)}
        except (ModuleNotFoundError, RuntimeError, ValueError) as error:
            methods[name] = {"error": without(error)}
            continue

        def timed(number: int, method: Search = method) -> Times:
            queries = batches[number % len(batches)]
            started = time.perf_counter()
            method(queries)
            return {"seconds": time.perf_counter() - started}

        calls[name] = timed
    for name, runs in in_turns(calls, arguments).items():
        methods[name]["seconds"] = [run["seconds"] for run in runs]
    return {"methods": methods, "checked": len(sample), "describe": PatchScorer(bank).describe()}


Stages = list[tuple[str, Callable[[Any], Any]]]


def _timed_stages(stages: Stages, value: Any) -> Times:
    """Milliseconds of each stage, each fed with what the one before returns, and of all."""
    result: Times = {}
    for name, stage in stages:
        started = time.perf_counter()
        value = stage(value)
        result[name] = 1000 * (time.perf_counter() - started)
    return {"whole": sum(result.values()), **result}


def ours_scoring(bank: Tensor, threads: int) -> Stages:
    """The parts of PatchScorer.forward, and anomaly_maps."""
    from patchcore_ext import ops
    from patchcore_ext.scoring import anomaly_maps

    prepared = ops.prepare_bank(bank)

    def find(patches: Tensor) -> Any:
        squared, nearest = ops.nearest_neighbors(patches, bank, 1, prepared)
        return patches, squared.T, nearest.T, ops.square_root(squared.T).float()

    def weigh(found: Any) -> Any:
        patches, squared, nearest, distances = found
        return ops.image_scores(squared.contiguous(), nearest.contiguous(), patches, bank, 9, prepared), distances

    return [("search", find), ("eq7", weigh), ("map", lambda scored: (scored[0], anomaly_maps(scored[1], GRID, SIZE)))]


def ours_whole(bank: Tensor, threads: int) -> Stages:
    """PatchScorer.forward and anomaly_maps, as they are called."""
    from patchcore_ext import PatchScorer
    from patchcore_ext.scoring import anomaly_maps

    scorer = PatchScorer(bank)

    def score(patches: Tensor) -> Any:
        scores = scorer(patches)
        return scores.image_scores, anomaly_maps(scores.patch_distances, GRID, SIZE)

    return [("call", score)]


def anomalib_scoring(bank: Tensor, threads: int) -> Stages:
    """The steps of PatchcoreModel.forward behind the embedding."""
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    model = PatchcoreModel(layers=["layer2", "layer3"], backbone="resnet18", pre_trained=False, num_neighbors=9).eval()
    model.memory_bank = bank

    def find(patches: Tensor) -> Any:
        distances, nearest = model.nearest_neighbors(embedding=patches, n_neighbors=1)
        return patches, distances.reshape(1, -1), nearest.reshape(1, -1)

    def weigh(found: Any) -> Any:
        patches, distances, nearest = found
        return model.compute_anomaly_score(distances, nearest, patches), distances

    return [("search", find), ("eq7", weigh), ("map", lambda scored: (scored[0], model.anomaly_map_generator(scored[1].reshape(1, 1, *GRID), SIZE)))]


def amazons_steps(bank: Tensor, threads: int) -> Stages:
    """Those of patchcore-inspection: faiss, the largest squared distance, bilinear interpolation, scipy's gaussian; it has no Eq. (7)."""
    import faiss
    from scipy import ndimage

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatL2(bank.shape[1])
    index.add(bank.numpy())

    def draw(distances: Any) -> Any:
        cells = torch.from_numpy(distances).reshape(1, 1, *GRID)
        maps = nn.functional.interpolate(cells, size=SIZE, mode="bilinear", align_corners=False)[:, 0].numpy()
        return distances.max(), [ndimage.gaussian_filter(values, sigma=4) for values in maps]

    return [("search", lambda patches: index.search(patches.numpy(), 1)[0]), ("map", draw)]


SCORINGS = {"ours": ours_whole, "ours in parts": ours_scoring, "anomalib": anomalib_scoring, "amazon's steps": amazons_steps}
BACKBONES = ("resnet18", "wide_resnet50_2")


def scoring(arguments: dict[str, Any]) -> dict[str, Any]:
    """Checks our search, then times all ways to score one image and the networks in turns; to score is timed right behind a ResNet18, as in an inspection."""
    from patchcore_ext.features import FeatureExtractor

    bank, batches = load(arguments)
    problem, _, _ = check_ours(bank, batches, 1)
    if problem is not None:
        return {"mismatch": problem}
    images = torch.rand((1, 3, *SIZE), generator=torch.Generator().manual_seed(0))
    networks = {name: FeatureExtractor(name, ("layer2", "layer3"), weights=None).network for name in BACKBONES}
    methods: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[int], Times]] = {}

    def behind_a_network(stages: Stages, patches: Tensor) -> Times:
        networks["resnet18"](images)
        return _timed_stages(stages, patches)

    for name, build in SCORINGS.items():
        try:
            stages = build(bank, arguments["threads"])
        except ModuleNotFoundError as error:
            methods[name] = {"error": without(error)}
            continue
        value: Any = batches[0]
        for _, stage in stages:  # warms up
            value = stage(value)
        methods[name] = {"image_score": float(value[0])}
        calls[name] = lambda number, stages=stages: behind_a_network(stages, batches[number % len(batches)])
    for name, network in networks.items():
        network(images)
        methods[name] = {}
        calls[name] = lambda _, network=network: _timed_stages([("network", network)], images)
    for name, runs in in_turns(calls, arguments).items():
        methods[name]["ms"] = {stage: [run[stage] for run in runs] for stage in runs[0]}
    return {"methods": methods}


def main() -> None:
    """Runs the task and prints JSON."""
    arguments: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(arguments["threads"])
    with torch.inference_mode():
        print(json.dumps({"search": search, "scoring": scoring}[arguments["task"]](arguments)))


if __name__ == "__main__":
    main()
