"""Nearest neighbours, and whole scoring of an image, against what people use: ``python -m benchmarks.bench_knn [--quick] [--peers PYTHON]``.

Ours is first compared with every distance in float64, indices and distances bit by bit; a mismatch is reported and nothing timed. Of the others the share of
queries is counted to which they give a row that is not the nearest. The methods of a case take turns in one process, so that a slow minute of the machine
hits all of them; read the ratios. Where a case searches for fewer images than there are, each repetition takes the next ones, for all methods the same;
for one image, a repetition is the mean of two, a good one and a defective one, as these take different times.

Whole scoring runs in the environment that ``--peers PYTHON`` names, where anomalib is, beside patchcore_ext (``make bench-peers`` makes one); else without it.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

from .feature_sets import CORESET_ROWS, PATCHES, QUERY_IMAGES, TRAIN_IMAGES, real_source, search_paths
from .harness import RESULTS, bar_chart, machine, read_rows, run_worker, summary, write_readme, write_results

WORKER = "benchmarks.knn_methods"
ONE_PERCENT, TEN_PERCENT, ALL_ROWS = CORESET_ROWS // 10, CORESET_ROWS, TRAIN_IMAGES * PATCHES
EXACT = ("ours", "ours_one_call", "faiss_flat", "sklearn_brute", "torch_matmul", "torch_cdist")
APPROXIMATE = ("faiss_hnsw", "faiss_ivfpq")
NAMES = {
    "ours": "ours",
    "ours_one_call": "ours, one call",
    "faiss_flat": "faiss flat",
    "sklearn_brute": "sklearn brute",
    "torch_matmul": "torch matmul",
    "torch_cdist": "torch cdist",
    "faiss_hnsw": "faiss HNSW",
    "faiss_ivfpq": "faiss IVFPQ",
}
BACKBONES = ("resnet18", "wide_resnet50_2")
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What is searched, or scored, and by which methods."""

    set: str
    dim: int
    bank_rows: int
    images: int = 1
    k: int = 1
    methods: tuple[str, ...] = ()
    threads: tuple[int, ...] = (1,)
    task: str = "search"

    @property
    def key(self) -> list[Any]:
        """What tells its rows from those of other cases."""
        return [self.task, self.set, self.dim, self.bank_rows, self.images * PATCHES, self.k]


def key_of(row: Row) -> list[Any]:
    """``Case.key`` of a row's case."""
    return [row[field] for field in ("task", "set", "dim", "bank_rows", "queries", "k")]


def plan(quick: bool) -> list[Case]:
    """The cases; the first one is drawn."""
    few = ("ours", "faiss_flat", "torch_matmul")
    if quick:
        return [Case("real", 384, rows, methods=("ours", "faiss_flat")) for rows in (ONE_PERCENT, TEN_PERCENT)]
    return [
        Case("real", 384, TEN_PERCENT, methods=(*EXACT, *APPROXIMATE), threads=(1, 2)),
        *(Case("real", dim, TEN_PERCENT, methods=EXACT) for dim in (512, 1024, 1536)),
        *(Case("pooled", dim, TEN_PERCENT, methods=EXACT) for dim in (656, 1024)),
        Case("real", 384, ONE_PERCENT, methods=EXACT),
        Case("real", 384, ALL_ROWS, methods=("ours", "ours_one_call", "faiss_flat", "torch_matmul")),
        Case("real", 384, TEN_PERCENT, images=8, methods=few, threads=(1, 2)),
        Case("real", 384, TEN_PERCENT, images=QUERY_IMAGES, methods=few),
        Case("real", 384, TEN_PERCENT, k=9, methods=EXACT),
        *(Case("gaussian", dim, TEN_PERCENT, methods=("ours", "faiss_flat")) for dim in (384, 1024)),
        Case("offset", 384, TEN_PERCENT, methods=EXACT),
        *(Case("real", dim, rows, threads=(1, 2), task="scoring") for dim, rows in ((384, ONE_PERCENT), (384, TEN_PERCENT), (1536, TEN_PERCENT))),
    ]


def run_case(case: Case, threads: int, repeats: int, python: str) -> dict[str, Any]:
    """What the worker says."""
    arguments = {
        **search_paths(case.set, case.dim),
        "task": case.task,
        "bank_rows": case.bank_rows,
        "images": case.images,
        "k": case.k,
        "offset": 100 if case.set == "offset" else 0,
        "methods": case.methods,
        "threads": threads,
        "repeats": repeats,
    }
    return run_worker(python, WORKER, arguments, {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")})


def milliseconds(values: list[float], scale: float) -> dict[str, Any]:
    """Median and interquartile range."""
    found = summary([scale * value for value in values])
    return {"ms": round(found["median"], 3), "iqr": round(found["iqr"], 3), "runs": len(values)}


def search_row(method: str, result: dict[str, Any], describe: dict[str, Any]) -> Row:
    """One method of a search."""
    if "error" in result:
        return {"method": method, "error": result["error"]}
    row = {"method": method, **milliseconds(result["seconds"], 1000), "wrong": result["wrong"], "build_seconds": round(result["build_seconds"], 3)}
    if method == "ours":
        row |= {"build_seconds": round(describe["prepare_seconds"], 3), "bank_bytes": describe["bank_bytes"], "prepared_bytes": describe["prepared_bytes"]}
    return row


def scoring_row(method: str, result: dict[str, Any]) -> Row:
    """One way to score, or a network, with the medians of its stages."""
    if "error" in result:
        return {"method": method, "error": result["error"]}
    stages = {f"{stage}_ms": round(summary(values)["median"], 3) for stage, values in result["ms"].items() if stage in ("search", "eq7", "map")}
    score = {"image_score": result["image_score"]} if "image_score" in result else {}
    return {"method": method, **milliseconds(result["ms"]["whole"], 1), **stages, **score}


def bench(case: Case, repeats: int, peers: str | None) -> list[Row]:
    """All methods of a case, on each number of threads."""
    python = peers if peers and case.task == "scoring" else sys.executable
    rows: list[Row] = []
    for threads in case.threads:
        about = {**dict(zip(("task", "set", "dim", "bank_rows", "queries", "k"), case.key, strict=True)), "threads": threads}
        result = run_case(case, threads, repeats, python)
        if "methods" not in result:
            problem = result.get("mismatch", result.get("error"))
            print(f"{case}: {problem}; not timed", file=sys.stderr)
            rows.append({**about, "method": "ours", "error": f"{problem}; not timed"})
            continue
        if case.task == "scoring":
            new = [scoring_row(method, found) for method, found in result["methods"].items()]
        else:
            new = [search_row(method, found, result["describe"]) for method, found in result["methods"].items()]
        rows += [{**about, **row} for row in new]
        for row in new:
            said = f"{row['ms']:.2f} ms" if "ms" in row else row["error"]
            print(
                f"{case.task:>7} {case.set:>8} D={case.dim:<5} M={case.bank_rows:<7} Q={about['queries']:<6} k={case.k} x{threads} {row['method']:>16}: {said}"
            )
        sys.stdout.flush()
    return rows


def merged(new: list[Row], old: list[Row]) -> list[Row]:
    """The old rows with those of the new ones' case replaced, in their place; new rows name their own commit."""
    same = [key_of(row) == key_of(new[0]) for row in old]
    place = same.index(True) if any(same) else len(old)
    kept = [row for row, replaced in zip(old, same, strict=True) if not replaced]
    return [*kept[:place], *({**row, "commit": machine()["commit"]} for row in new), *kept[place:]]


def ms_of(rows: list[Row], like: Row, method: str) -> float | None:
    """The milliseconds of a method on the case and the threads of a row."""
    return next((row.get("ms") for row in rows if (key_of(row), row["threads"], row["method"]) == (key_of(like), like["threads"], method)), None)


def search_table(rows: list[Row]) -> str:
    """Markdown: milliseconds, times ours on as many threads, and how often the row is not the nearest."""
    lines = ["| set | D | bank rows | queries | k | method | threads | ms | x ours | wrong nearest / recall@1 |", "|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        name = NAMES[row["method"]]
        head = f"| {row['set']} | {row['dim']} | {row['bank_rows']:,} | {row['queries']:,} | {row['k']} | {name} | {row['threads']} "
        if "error" in row:
            lines.append(f"{head}| {row['error']} | | |")
            continue
        wrong = f"{100 * row['wrong']:.2f}% wrong" if row["wrong"] else "0"
        quality = f"recall {1 - row['wrong']:.3f}" if row["method"] in APPROXIMATE else wrong
        base = ms_of(rows, row, "ours")
        ratio = f"{row['ms'] / base:.2f}" if base else ""
        lines.append(f"{head}| {row['ms']:.2f} ± {row['iqr']:.2f} | {ratio} | {quality} |")
    return "\n".join(lines)


def bank_table(rows: list[Row]) -> str:
    """Markdown: what preparing a bank takes."""
    lines = ["| set | D | bank rows | threads | seconds to prepare | bank MB | int8 copies MB |", "|---|---|---|---|---|---|---|"]
    seen: set[tuple[Any, ...]] = set()
    for row in rows:
        bank = tuple(row[field] for field in ("set", "dim", "bank_rows", "threads"))
        if row["method"] != "ours" or "ms" not in row or bank in seen:
            continue
        seen.add(bank)
        lines.append(
            f"| {row['set']} | {row['dim']} | {row['bank_rows']:,} | {row['threads']} | {row['build_seconds']:.2f} "
            f"| {row['bank_bytes'] / 1e6:.1f} | {row['prepared_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def scoring_table(rows: list[Row]) -> str:
    """Markdown: milliseconds an image in all and in parts; and ours as a share of the networks' time."""
    lines = ["| D | bank rows | method | threads | ms | search | Eq. (7) | map | x ours | ours as % of it |", "|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        network = row["method"] in BACKBONES
        name = f"{row['method']} up to layer3, forward" if network else row["method"]
        head = f"| {row['dim']} | {row['bank_rows']:,} | {name} | {row['threads']} "
        if "error" in row:
            lines.append(f"{head}| {row['error']} | | | | | |")
            continue
        parts = " | ".join(f"{row[part]:.2f}" if part in row else "" for part in ("search_ms", "eq7_ms", "map_ms"))
        base = ms_of(rows, row, "ours")
        ratio = f"{row['ms'] / base:.2f}" if base and not network else ""
        share = f"{100 * base / row['ms']:.0f}%" if base and network else ""
        lines.append(f"{head}| {row['ms']:.2f} ± {row['iqr']:.2f} | {parts} | {ratio} | {share} |")
    return "\n".join(lines)


def tables(rows: list[Row]) -> str:
    """All of them that have rows."""
    searched, scored = ([row for row in rows if row["task"] == task] for task in ("search", "scoring"))
    found = (
        [f"Search, milliseconds (median ± interquartile range).\n\n{search_table(searched)}\n\nPrepared banks.\n\n{bank_table(searched)}"] if searched else []
    )
    if scored:
        found.append(f"Scoring one image of 224 px: {PATCHES} patches to an image score and a map [224, 224], milliseconds.\n\n{scoring_table(scored)}")
    return "\n\n".join(found)


def chart(name: str, rows: list[Row]) -> None:
    """results/<name>.svg: the first case on its first number of threads."""
    first = next((row for row in rows if row["task"] == "search" and "ms" in row), None)
    if first is None:
        return
    bars = [row for row in rows if key_of(row) == key_of(first) and row["threads"] == first["threads"] and "ms" in row]
    head = f"{first['queries']:,} queries in {first['bank_rows']:,} rows, D = {first['dim']}, {first['threads']} thread: ms (logarithmic)"
    names = [NAMES[row["method"]] + (f" (recall {1 - row['wrong']:.2f})" if row["method"] in APPROXIMATE else "") for row in bars]
    bar_chart(RESULTS / f"{name}.svg", head, [(label, row["ms"], row["method"].startswith("ours")) for label, row in zip(names, bars, strict=True)])


def main() -> None:
    """Runs the plan; without --quick also writes the results, the chart and the tables."""
    parser = argparse.ArgumentParser(description="Nearest neighbours, and whole scoring of an image, against what people use.")
    parser.add_argument("--quick", action="store_true", help="a minute's worth; writes no results")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter of an environment with anomalib")
    parser.add_argument("--only", type=int, metavar="CASE", help="run this case of the plan alone (0 is the first) and put its rows into the results there are")
    parser.add_argument("--name", default="knn", help="of the results' files, and of the marks in benchmarks/README.md: one for each machine (default: knn)")
    parser.add_argument("--repeats", type=int, default=9, help="runs of each method, of slow ones at most 3; the median counts")
    arguments = parser.parse_args()
    cases = plan(arguments.quick)
    rows: list[Row] = []
    for case in cases if arguments.only is None else [cases[arguments.only]]:
        rows += bench(case, 3 if arguments.quick else arguments.repeats, arguments.peers)
    if arguments.quick:
        print(tables(rows))
        return
    if arguments.only is not None:
        rows = merged(rows, read_rows(arguments.name))
    print(tables(rows))
    dims = (
        "maps of 2 to 11 layers side by side; pooled: layer2 + layer3 by aggregation paper"
        if real_source().startswith("magnetic")
        else "every D by aggregation paper"
    )
    note = (
        f"Real rows: {real_source()}, {dims}; {TRAIN_IMAGES} good images, greedy coresets of 1% and 10% of their {ALL_ROWS:,} patches or all of them; queries "
        f"of {QUERY_IMAGES} other images, half of them defective; a run for one image is the mean of a good and a defective one. "
        "*offset* is the same with 100 added to every value."
    )
    print(write_results(arguments.name, rows, note))
    chart(arguments.name, rows)
    write_readme(arguments.name, f"{note}\n\n{tables(rows)}\n\n![Milliseconds by method](results/{arguments.name}.svg)")


if __name__ == "__main__":
    main()
