"""What the benchmarks share: the machine, medians, subprocesses with their peak memory, result files."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from math import log10
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CACHE = ROOT / "build" / "benchmarks"  # feature sets and compiled baselines; safe to delete


def machine() -> dict[str, Any]:
    """Processor, cores, versions, commit and date: what a number means nothing without."""
    import torch

    import patchcore_ext

    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor()
    )
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "cpu_level": patchcore_ext.build_info()["cpu_level"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "patchcore_ext": patchcore_ext.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def run_worker(python: str, module: str, arguments: dict[str, Any], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs ``python -m module JSON`` in a process of its own and returns the JSON it prints last, with ``peak_rss_mb`` in it."""
    process = subprocess.run(
        [python, "-m", module, json.dumps(arguments)],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode != 0:
        return {"error": process.stderr.strip().splitlines()[-1] if process.stderr.strip() else f"exit status {process.returncode}"}
    result: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    return result


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and interquartile range."""
    quarter, _, three = quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0], seconds[0], seconds[0])
    return {"median": median(seconds), "iqr": three - quarter}


def bar_chart(path: Path, head: str, bars: list[tuple[str, float, bool]]) -> None:
    """Bars on a logarithmic axis, as SVG: (name, value, ours)."""
    values = [value for _, value, _ in bars]
    low, high = log10(0.5 * min(values)), log10(1.3 * max(values))
    left, width, step = 190, 520, 26
    height = 50 + step * len(bars)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 90}" height="{height}" font-family="sans-serif" font-size="13">']
    parts.append(f'<rect width="100%" height="100%" fill="white"/><text x="10" y="22" font-size="15">{head}</text>')
    for i, (name, value, ours) in enumerate(bars):
        y = 40 + step * i
        length = width * (log10(value) - low) / (high - low)
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{name}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{length:.0f}" height="{step - 8}" fill="{"#b3261e" if ours else "#7a8793"}"/>')
        parts.append(f'<text x="{left + length + 6:.0f}" y="{y + 14}">{value:.3g}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def read_rows(name: str) -> list[dict[str, Any]]:
    """Rows of ``benchmarks/results/<name>.json``, or none."""
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return rows


def write_results(name: str, rows: list[dict[str, Any]], note: str) -> Path:
    """``benchmarks/results/<name>.json``."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"machine": machine(), "note": note, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path
