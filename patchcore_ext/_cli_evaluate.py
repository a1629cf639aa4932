"""``patchcore-ext evaluate``: fit and test every class of a dataset."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ._cli_options import add_model_flags, model_settings, progress_of
from ._results import MAP_FORMATS
from .evaluation import evaluate


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the command to the parser's subcommands, with the flags that all commands have."""
    parser = commands.add_parser(
        "evaluate",
        parents=[common],
        help="fit and test on a labelled dataset",
        description="Fits on the good images of each class and measures how well defects in its test images are found. "
        "A class is a folder with train/good, test/<defect>, test/good and ground_truth/<defect>, as in MVTec AD.",
    )
    parser.add_argument("data", metavar="DATA", help="folder of one class, or of several")
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="folder for results.json, results.csv and a report of each class; a run that was interrupted goes on from there",
    )
    add_model_flags(parser)
    parser.add_argument("--save-maps", choices=MAP_FORMATS, help="write raw anomaly maps into DIR/<class>/maps")
    parser.set_defaults(run=lambda arguments: _evaluate(arguments, parser))


def _evaluate(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.save_maps and arguments.output is None:
        parser.error("--save-maps needs -o DIR")
    result = evaluate(
        model_settings(arguments, parser),
        arguments.data,
        output=arguments.output,
        save_maps=arguments.save_maps,
        false_alarm_rate=arguments.false_alarm_rate,
        progress=progress_of(arguments),
    )
    print(result.table())
    if arguments.output is not None and not arguments.quiet:
        print(os.path.join(arguments.output, "results.json"))
    unreadable = result.unreadable
    if unreadable:
        num_images = sum(len(item.images) for item in result.classes.values())
        raise ValueError(
            f"expected test images that can be read, got {len(unreadable)} of {num_images} that cannot be (the first is {unreadable[0]!r}); "
            "the results leave them out."
        )
