"""``python -m benchmarks.gpu_tables FILE``: what bench_gpu.py measured, maybe on another machine, into results/gpu.json and benchmarks/README.md."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .harness import RESULTS, write_readme

Row = dict[str, Any]
SETS = {"patches": "patches", "gaussian": "gaussian noise"}


def ours_of(rows: list[Row], like: Row) -> Row | None:
    """Our row of the same case, where it was timed."""
    case = ("task", "set", "queries", "rows", "dim", "offset", "picks")
    return next((row for row in rows if row["method"] == "ours" and "ms_warm" in row and all(row.get(key) == like.get(key) for key in case)), None)


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(row: Row, ours: Row | None) -> str:
    """Cells: milliseconds with a warm L2 cache and with a cold one, and times ours."""
    cold = number(row["ms_cold"]) if "ms_cold" in row else ""
    return f"{number(row['ms_warm'])} | {cold} | {number(row['ms_warm'] / ours['ms_warm']) if ours else ''}"


def search_table(rows: list[Row]) -> str:
    """Markdown of the searches."""
    lines = ["| set | queries | bank rows | D | method | ms | ms, cold L2 | x ours | wrong rows |", "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        if row["task"] != "search" or "ms_warm" not in row:
            continue
        name = SETS[row["set"]] + (f", +{row['offset']:g}" if row["offset"] else "")
        case = f"{name} | {row['queries']:,} | {row['rows']:,} | {row['dim']:,}"
        lines.append(f"| {case} | {row['method']} | {times(row, ours_of(rows, row))} | {100 * row['wrong']:.3g}% |")
    return "\n".join(lines)


def coreset_table(rows: list[Row]) -> str:
    """Markdown of the selections."""
    lines = ["| picks | rows | D | method | ms | ms, cold L2 | x ours |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        if row["task"] == "coreset" and "ms_warm" in row:
            lines.append(f"| {row['picks']:,} | {row['rows']:,} | {row['dim']} | {row['method']} | {times(row, ours_of(rows, row))} |")
    return "\n".join(lines)


def kernels(row: Row) -> str:
    """The kernels that take longest, and what part of the calculated time the whole reaches."""
    longest = list(row["kernels_ms"].items())[:6]
    share = f"; the calculated time is {100 * row['share_of_roof']:.0f}% of the measured one" if row.get("share_of_roof") else ""
    return ", ".join(f"{name.removesuffix('_kernel')} {ms:.3g}" for name, ms in longest) + share


def text(results: dict[str, Any]) -> str:
    """The section."""
    info, rows = results["info"], results["rows"]
    device = info["cuda_devices"][0]
    machine = results["processor"]
    copied, products = (results["limits"][name] / 1e12 for name in ("copy_bytes_per_second", "int8_products_per_second"))
    profiled = [
        f"- {row['task']}, {SETS[row['set']] if row['task'] == 'search' else format(row['picks'], ',') + ' picks'}, "
        f"{row['queries' if row['task'] == 'search' else 'rows']:,} rows, D = {row['dim']:,}: {kernels(row)}."
        for row in rows
        if "kernels_ms" in row
    ]
    return f"""One {device["name"]}, torch {info["torch"]}, nvcc {info["cuda_toolkit"]}, {machine["date"]}, commit {machine["commit"]}. Patches:
{results["features"]} (D = 1,024: more layers side by side; a million rows: points between
real ones as well); banks are greedy coresets of 200 images. Milliseconds by CUDA events, medians, host work and the check for bad values
included. Ours was first compared, bit for bit, with the CPU kernels and with plain float64; the torch loop is extrapolated from its first picks.
The card copied {copied:.3g} TB/s, and torch multiplied {products:.3g} T int8 products a second.

{search_table(rows)}

{coreset_table(rows)}

Where the time goes, milliseconds:

{chr(10).join(profiled)}"""


def publish(results: dict[str, Any]) -> None:
    """Writes both files."""
    write_readme("gpu-measured", text(results))
    temporary = RESULTS / "gpu.tmp"
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(RESULTS / "gpu.json")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Publishes what bench_gpu.py measured.")
    parser.add_argument("file", type=Path, help="what bench_gpu.py --output wrote")
    publish(json.loads(parser.parse_args().file.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
