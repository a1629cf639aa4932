"""``patchcore-ext inspect``: what a model file holds, without its backbone."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ._evaluation_results import printable
from ._model_file import ModelRecord, read_model
from .memory_bank import MemoryBank

_MOST_USED = 5


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the command to the parser's subcommands, with the flags that all commands have."""
    parser = commands.add_parser("inspect", parents=[common], help="show what is in a model file", description="Shows what a model file holds.")
    parser.add_argument("model", metavar="MODEL", help="model file")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    bank, record = read_model(arguments.model)
    content = describe(bank, record, os.path.getsize(arguments.model))
    if arguments.json:
        print(json.dumps(content, indent=2))
        return
    lines = list(_lines(content))
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{width}}  {printable(text)}")


def describe(bank: MemoryBank, record: ModelRecord, file_bytes: int) -> dict[str, Any]:
    """What a model file holds, as plain JSON values.

    Args:
        bank: the memory bank of the file.
        record: the file's JSON part.
        file_bytes: size of the file.

    Returns:
        A dict with ``file_bytes``, ``memory_bank``, ``backbone``, ``settings``, ``threshold`` and ``images``.
    """
    fit = record.fit
    found_by = ("threshold_from", "num_scores", "false_alarm_rate", "expected_false_alarm_rate")
    backbone = record.backbone
    return {
        "file_bytes": file_bytes,
        "memory_bank": {"rows": len(bank), "dim": bank.dim, "dtype": str(bank.features.dtype).removeprefix("torch."), "bytes": bank.nbytes},
        "backbone": {
            "name": backbone.name,
            "weights": backbone.weights,
            "digest": backbone.digest,
            "custom": backbone.custom,
            "included": backbone.included,
        },
        "settings": dict(record.settings),
        "threshold": {"value": record.threshold, **{name: fit.get(name) for name in found_by}},
        "images": {
            "fitted": fit.get("num_images"),
            "in_bank": len(bank.image_names),
            "held_out": len(fit.get("held_out_names", ())),
            "most_used": _most_used(bank),
        },
    }


def _most_used(bank: MemoryBank) -> list[dict[str, Any]]:
    """The images with the most rows in the bank; of equal ones the first."""
    if bank.image_indices is None or not bank.image_names:
        return []
    rows = torch.bincount(bank.image_indices.long(), minlength=len(bank.image_names))
    order = torch.argsort(rows, descending=True, stable=True)[:_MOST_USED].tolist()
    return [{"path": bank.image_names[index], "rows": int(rows[index])} for index in order]


def _lines(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    bank, backbone, settings, threshold, images = (content[name] for name in ("memory_bank", "backbone", "settings", "threshold", "images"))
    yield "file", f"{content['file_bytes']:,} bytes"
    yield "memory bank", f"{bank['rows']:,} rows x {bank['dim']} {bank['dtype']}, {bank['bytes']:,} bytes"
    weights = "of its own" if backbone["custom"] else backbone["weights"] or "random"
    yield "backbone", f"{backbone['name']}, weights {weights}, {'in the file' if backbone['included'] else 'not in the file'}"
    yield "digest", str(backbone["digest"])
    yield "threshold", f"{threshold['value']:.6g}"
    if threshold["threshold_from"] is not None:
        yield "found from", f"{threshold['num_scores']} {threshold['threshold_from']}"
        yield "false alarms", f"{threshold['false_alarm_rate']:.3g} asked for, {threshold['expected_false_alarm_rate']:.3g} expected"
    yield "images", f"{images['fitted']} good ones, {images['in_bank']} of them in the bank, {images['held_out']} held out"
    for entry in images["most_used"]:
        yield "most used", f"{entry['rows']:,} rows ({entry['rows'] / bank['rows']:.1%}) of {entry['path']}"
    for name, value in settings.items():
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
