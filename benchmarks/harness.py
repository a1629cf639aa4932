"""What the benchmarks share: the machine, medians, subprocesses with their peak memory, result files."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from math import ceil, floor, log10
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from xml.sax.saxutils import escape

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


def peak_memory_mb() -> float:
    """Most memory that this process has had in RAM so far, in MiB."""
    # Not getrusage's figure, which begins with that of the process that started this one.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def run_worker(python: str, module: str, arguments: dict[str, Any], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs ``python -m module JSON`` in a process of its own and returns the JSON it prints last."""
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


COLORS = ("#b3261e", "#1f5fa8", "#2e7d32", "#8e5bb5", "#c77700", "#00838f", "#7a8793", "#ad1457")


def line_chart(
    path: Path, head: str, series: dict[str, list[tuple[float, float]]], labels: tuple[str, str], *, log_x: bool = False, markers: bool = True
) -> None:
    """Lines through points (x, y) with axes and a legend, as SVG.

    Args:
        path: the file.
        head: title.
        series: points by name, in the order of x.
        labels: of the x axis and the y axis.
        log_x: logarithmic x axis; all x are positive then.
        markers: a dot at each point.
    """
    left, top, width, height = 64, 40, 520, 300
    place = log10 if log_x else float
    xs, ys = [[point[axis] for points in series.values() for point in points] for axis in (0, 1)]
    (low_x, high_x), (low_y, high_y) = _range([place(x) for x in xs]), _range(ys, 0.06)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + width * (place(x) - low_x) / (high_x - low_x), top + height * (high_y - y) / (high_y - low_y)

    total = max(top + height + 56, top + 20 * len(series) + 20)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 220}" height="{total}" font-family="sans-serif" font-size="12">']
    parts.append(f'<rect width="100%" height="100%" fill="white"/><text x="10" y="22" font-size="15">{escape(head)}</text>')
    parts.append(f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#7a8793"/>')
    distinct = sorted(set(xs))
    for x in distinct if len(distinct) <= 12 else [low_x + i * (high_x - low_x) / 5 for i in range(6)]:
        parts.append(f'<text x="{at(x, low_y)[0]:.1f}" y="{top + height + 18}" text-anchor="middle">{x:g}</text>')
    for y in _ticks(low_y, high_y):
        parts.append(f'<path d="M{left} {at(xs[0], y)[1]:.1f}h{width}" stroke="#d5dade"/>')
        parts.append(f'<text x="{left - 6}" y="{at(xs[0], y)[1] + 4:.1f}" text-anchor="end">{y:g}</text>')
    parts.append(f'<text x="{left + width / 2}" y="{top + height + 40}" text-anchor="middle">{escape(labels[0])}</text>')
    parts.append(f'<text transform="translate(16 {top + height / 2}) rotate(-90)" text-anchor="middle">{escape(labels[1])}</text>')
    for i, (name, points) in enumerate(series.items()):
        color, places = COLORS[i % len(COLORS)], [at(x, y) for x, y in points]
        parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places if markers]
        parts.append(f'<rect x="{left + width + 14}" y="{top + 20 * i}" width="14" height="4" fill="{color}"/>')
        parts.append(f'<text x="{left + width + 34}" y="{top + 20 * i + 7}">{escape(name)}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, four to ten of them."""
    step = next(step for power in range(-12, 13) for step in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if (high - low) / step <= 9)
    return [round(i * step, 12) for i in range(ceil(low / step), floor(high / step) + 1)]


def _range(values: list[float], margin: float = 0.0) -> tuple[float, float]:
    """From the smallest to the largest and a little more; never empty."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return low - margin * span, high + (margin if high > low else 1.0) * span


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


def write_readme(name: str, text: str) -> None:
    """Puts tables between the marks of benchmarks/README.md that bear this name, which must be there."""
    path = ROOT / "benchmarks" / "README.md"
    whole = path.read_text(encoding="utf-8")
    start, end = f"<!-- {name}: generated -->", f"<!-- /{name} -->"
    if start not in whole or end not in whole:
        raise SystemExit(f"{path} lacks the marks {start} and {end}; nothing written there")
    before, _, rest = whole.partition(start)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}", encoding="utf-8")
