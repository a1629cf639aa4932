"""Search and coreset selection on a GPU, against torch and, where installed, faiss, cuVS and FlashLib, and against the card's limits (gpu_roofs.py).

``python -m benchmarks.bench_gpu`` needs a CUDA device. Ours is first compared, bit for bit, with the CPU kernels and with plain float64, and what differs is
reported and not timed; of the others the share of wrong rows is told. Times are medians by CUDA events, with the L2 cache warm from the run before, and cold:
overwritten in between. Features are real ones where the images and weights are at hand (feature_sets.py, magnetic tiles), else made to be like them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchcore_ext import CoresetSampler, build_info, ops, reference

from . import feature_sets, gpu_roofs
from .harness import machine

Row = dict[str, Any]
Search = Callable[[], Tensor]  # indices [Q]
CHECKED_QUERIES = 64  # whose every distance is computed in float64 by plain torch; all are compared with the CPU kernels
FLUSH_BYTES = 256 << 20  # more than any L2


def features(rows: int, dim: int, seed: int) -> Tensor:
    """Rows like patch features: some 300 kinds of patch, variance that falls off over the directions, not negative."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shared = torch.Generator("cuda").manual_seed(0)  # the same kinds and directions for bank and queries
    rank = min(dim, 96)
    directions = torch.randn(rank, dim, generator=shared, device="cuda") * (torch.arange(1, rank + 1, device="cuda")[:, None] ** -0.7)
    kinds = torch.randn(300, rank, generator=shared, device="cuda")
    chosen = kinds[torch.randint(0, 300, (rows,), generator=generator, device="cuda")]
    mixed = chosen + 0.35 * torch.randn(rows, rank, generator=generator, device="cuda")
    return torch.relu(mixed @ directions + 0.02 * torch.randn(rows, dim, generator=generator, device="cuda"))


def is_real() -> bool:
    """Whether there are real images."""
    return feature_sets.real_source().startswith("magnetic")


def search_set(name: str, dim: int, num_queries: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Bank and queries: "gaussian", or patch features, the bank a greedy coreset of them where they are real."""
    if name == "gaussian":
        generator = torch.Generator("cuda").manual_seed(4)
        bank, queries = (torch.randn(rows, dim, generator=generator, device="cuda") for rows in (num_rows, num_queries))
        return bank, queries
    if not is_real():
        return features(num_rows, dim, 1), features(num_queries, dim, 2)
    paths = feature_sets.patch_paths("real", dim)
    rows, queries = (torch.from_numpy(np.load(path)).cuda() for path in paths)
    return rows[CoresetSampler(num_samples=num_rows, progress=False).select(rows).indices], queries[:num_queries].contiguous()


def coreset_set(num_rows: int, dim: int) -> Tensor:
    """Rows to select from."""
    if not is_real() or dim != feature_sets.DIM:
        return features(num_rows, dim, 3)
    return torch.from_numpy(np.load(feature_sets.path_of("real", num_rows))).cuda()


def kernel_milliseconds(run: Callable[[], object]) -> dict[str, float]:
    """Time on the device by kernel, of one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        if event.self_device_time_total > 0:
            name = re.search(r"(\w+_kernel)\b", event.key)
            times[name[1] if name else event.key[:40]] += event.self_device_time_total / 1e3
    return {name: round(ms, 4) for name, ms in sorted(times.items(), key=lambda item: -item[1])}


def milliseconds(run: Callable[[], object], repeats: int, cold: bool) -> float:
    """Median time of a call on the device."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda") if cold else None
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        if flush is not None:
            flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times)


def by_matmul(queries: Tensor, bank: Tensor) -> Search:
    """|q|^2 - 2 q b + |b|^2 in float32."""
    norms = bank.square().sum(1)
    return lambda: torch.topk(torch.addmm(norms, queries, bank.T, alpha=-2), 1, largest=False).indices[:, 0]


def by_cdist(queries: Tensor, bank: Tensor) -> Search:
    return lambda: torch.cdist(queries, bank).argmin(1)


def by_faiss(queries: Tensor, bank: Tensor) -> Search:
    import faiss
    import faiss.contrib.torch_utils

    resources = faiss.StandardGpuResources()  # an AttributeError where faiss was built for the CPU
    return lambda: faiss.knn_gpu(resources, queries, bank, 1)[1][:, 0]


def by_cuvs(queries: Tensor, bank: Tensor) -> Search:
    import cupy
    from cuvs.neighbors import brute_force

    index = brute_force.build(cupy.asarray(bank), metric="sqeuclidean")
    asked = cupy.asarray(queries)
    return lambda: torch.as_tensor(brute_force.search(index, asked, 1)[1], device="cuda")[:, 0].long()


def by_flashlib(queries: Tensor, bank: Tensor) -> Search:
    from flashlib import flash_knn

    return lambda: flash_knn(queries, bank, 1)[1].reshape(len(queries)).long()


SEARCHES: dict[str, Callable[[Tensor, Tensor], Search]] = {
    "torch matmul + topk": by_matmul,
    "torch.cdist": by_cdist,
    "faiss": by_faiss,
    "cuVS": by_cuvs,
    "FlashLib": by_flashlib,
}


def bench_search(name: str, num_queries: int, num_rows: int, dim: int, offset: float, repeats: int) -> list[Row]:
    """One set of features, by all methods."""
    bank, queries = (rows + offset for rows in search_set(name, dim, num_queries, num_rows))
    prepared = ops.prepare_bank(bank)
    squared, indices = ops.nearest_neighbors(queries, bank, 1, prepared)
    case = {"task": "search", "set": name, "queries": num_queries, "rows": num_rows, "dim": dim, "offset": offset}
    same = all(torch.equal(a.cpu(), b) for a, b in zip((squared, indices), ops.nearest_neighbors(queries.cpu(), bank.cpu(), 1), strict=True))
    some = slice(None, None, max(1, num_queries // CHECKED_QUERIES))
    expected, expected_rows = reference.nearest_neighbors(queries[some].cpu(), bank.cpu(), 1)
    same = same and torch.equal(squared[some].cpu(), expected) and torch.equal(indices[some].cpu(), expected_rows)
    if not same:
        return [{**case, "method": "ours", "error": "differs from the CPU or from float64"}]
    rows: list[Row] = []

    def timed(method: str, run: Callable[[], object], wrong: float, repeats: int) -> None:
        row = {**case, "method": method, "wrong": wrong, "ms_warm": milliseconds(run, repeats, False), "ms_cold": milliseconds(run, repeats, True)}
        if method == "ours":
            row["share_of_roof"] = share_of_roof(gpu_roofs.search(num_queries, num_rows, dim), row["ms_warm"])
            row["kernels_ms"] = kernel_milliseconds(run)
        rows.append(row)

    timed("ours", lambda: ops.nearest_neighbors(queries, bank, 1, prepared), 0.0, repeats)
    for name, make in SEARCHES.items():
        try:
            run = make(queries, bank)
            found = run()
            exact = (queries.double() - bank[found].double()).square().sum(1)
            timed(name, run, float((exact > squared[:, 0] * (1 + 1e-12)).float().mean()), max(3, repeats // 3))
        except (ImportError, AttributeError) as error:
            rows.append({**case, "method": name, "error": f"not installed: {error}"})
        except Exception as error:  # whatever another library throws is told, and ours is still measured
            rows.append({**case, "method": name, "error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})
        torch.cuda.empty_cache()
    return rows


def torch_greedy(rows: Tensor, picks: int) -> Tensor:
    """The plain loop: a matrix-vector product a pick, in float32."""
    norms = rows.square().sum(1)
    nearest = torch.full_like(norms, float("inf"))
    chosen = torch.empty(picks, dtype=torch.long, device=rows.device)
    for i in range(picks):
        pick = nearest.argmax()
        chosen[i] = pick
        nearest = torch.minimum(nearest, torch.addmv(norms, rows, rows[pick], alpha=-2) + norms[pick])
        nearest[pick] = -1
    return chosen


def bench_coreset(num_rows: int, dim: int, picks: int, repeats: int) -> list[Row]:
    """A selection, against the same on the CPU (checked there against the canonical loop) and the plain loop in torch."""
    rows = coreset_set(num_rows, dim)
    case = {"task": "coreset", "rows": num_rows, "dim": dim, "picks": picks}

    def state(device: str) -> Tensor:
        return torch.full((num_rows,), float("inf"), dtype=torch.float64, device=device)

    def run() -> tuple[Tensor, Tensor]:
        return ops.greedy_coreset(rows, state("cuda"), picks, ops.coreset_codes(rows))

    found = run()
    host = rows.cpu()
    expected = ops.greedy_coreset(host, state("cpu"), picks, ops.coreset_codes(host))
    if not all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True)):
        return [{**case, "method": "ours", "error": "differs from the CPU"}]
    warm, cold = milliseconds(run, repeats, False), milliseconds(run, repeats, True)
    share = share_of_roof(gpu_roofs.coreset(num_rows, dim, picks), warm)
    few = min(picks, 200)
    loop = milliseconds(lambda: torch_greedy(rows, few), 3, False) * picks / few
    return [
        {**case, "method": "ours", "wrong": 0.0, "ms_warm": warm, "ms_cold": cold, "share_of_roof": share, "kernels_ms": kernel_milliseconds(run)},
        {**case, "method": f"torch loop (from {few} picks)", "ms_warm": loop},
    ]


def card() -> gpu_roofs.Card | None:
    """The card of gpu_roofs.py that the device is, or None."""
    name = torch.cuda.get_device_name()
    return next((known for known in gpu_roofs.CARDS if known.name.removeprefix("RTX ").split()[0] in name.split()), None)


def share_of_roof(works: list[gpu_roofs.Work], ms: float) -> float | None:
    """The calculated time over the measured one; None for a card that the model does not know."""
    known = card()
    return None if known is None else 1e3 * gpu_roofs.total(works, known) / ms


def limits() -> dict[str, float]:
    """What the device was seen to do: bytes a second of a large copy, int8 products a second of torch's own."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() / (1e-3 * milliseconds(lambda: target.copy_(source), 10, False))
    size = 8192
    a, b = (torch.randint(-127, 128, (size, size), dtype=torch.int8, device="cuda") for _ in range(2))
    products = 2 * size**3 / (1e-3 * milliseconds(lambda: torch._int_mm(a, b.t()), 10, False))
    return {"copy_bytes_per_second": copied, "int8_products_per_second": products}


def main() -> None:
    """Runs all cases and prints a table."""
    parser = argparse.ArgumentParser(description="Search and coreset selection on a GPU.")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    arguments = parser.parse_args()
    info = build_info()
    if not info["cuda_devices"] or info["cuda_devices"][0]["problem"] is not None:
        problems = [device["problem"] for device in info["cuda_devices"]] or [info["cuda_unavailable"]]
        raise SystemExit(f"bench_gpu: needs a CUDA device with kernels: {problems[0]}")
    scale = 16 if arguments.quick else 1
    source = feature_sets.real_source() if is_real() else "made"
    results: dict[str, Any] = {"info": info, "processor": machine(), "features": source, "limits": limits(), "rows": []}
    patches, bank = feature_sets.QUERY_IMAGES * feature_sets.PATCHES // scale, feature_sets.CORESET_ROWS // scale
    cases: list[Callable[[], list[Row]]] = [
        lambda: bench_search("patches", patches, bank, 1024, 0.0, arguments.repeats),
        lambda: bench_search("patches", feature_sets.PATCHES, bank, 1024, 0.0, arguments.repeats),
        lambda: bench_search("patches", patches, bank, 384, 0.0, arguments.repeats),
        lambda: bench_search("patches", feature_sets.PATCHES, bank, 384, 100.0, arguments.repeats),
        lambda: bench_search("gaussian", patches, bank, 1024, 0.0, arguments.repeats),
        lambda: bench_coreset(10 * bank, 128, bank, max(3, arguments.repeats // 5)),
        lambda: bench_coreset(1_000_000 // scale, 128, 10_000 // scale, max(3, arguments.repeats // 5)),
    ]
    failed = False
    for case in cases:
        for row in case():
            failed = failed or (row["method"] == "ours" and "error" in row)
            results["rows"].append(row)
            print(json.dumps(row), flush=True)
            if arguments.output is not None:
                arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results["limits"]))
    if failed:
        raise SystemExit("bench_gpu: ours differs from the reference")


if __name__ == "__main__":
    main()
