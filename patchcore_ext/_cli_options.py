"""Flags of the command line that several commands share, and the types of their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from .features import PRECISIONS

PROGRAM = "patchcore-ext"


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that decide what a fit does; `model_settings` reads them."""
    parser.add_argument("--backbone", default="wide_resnet50_2", help="torchvision network (default: %(default)s)")
    parser.add_argument("--weights", default="DEFAULT", help="torchvision weights name or state-dict file (default: torchvision's best)")
    parser.add_argument("--layers", nargs="+", default=["layer2", "layer3"], metavar="NAME", help="layers to use (default: layer2 layer3)")
    parser.add_argument("--resize", nargs="+", type=positive, default=[256, 256], metavar="N", help="short side, or height and width (default: 256 256)")
    parser.add_argument("--crop", nargs="+", type=positive, metavar="N", help="centre crop: side, or height and width (default: none)")
    parser.add_argument("--coreset-ratio", type=_share_or_all, default=0.1, metavar="R", help="share of patches to keep (default: 0.1)")
    parser.add_argument("--num-neighbors", type=positive, default=9, metavar="B", help="neighbours in the image score (default: 9)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="float32", help="of the backbone: bfloat16 is faster, and features differ by about 1%% (default: float32)"
    )
    parser.add_argument(
        "--false-alarm-rate",
        type=_share,
        default=0.01,
        metavar="R",
        help="tolerated share of good images called anomalous (default: 0.01)",
    )


def model_settings(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The keyword arguments of PatchCore out of the flags; sizes of more than two numbers are wrong use."""
    return {
        "backbone": arguments.backbone,
        "layers": arguments.layers,
        "weights": arguments.weights,
        "coreset_ratio": arguments.coreset_ratio,
        "num_neighbors": arguments.num_neighbors,
        "precision": arguments.precision,
        "resize": _size(arguments.resize, "--resize", parser),
        "crop": _size(arguments.crop, "--crop", parser),
        "device": arguments.device,
        "seed": arguments.seed,
    }


def progress_of(arguments: argparse.Namespace) -> bool | None:
    """What to pass as ``progress``: no bars with --quiet, else where there is a terminal."""
    return False if arguments.quiet else None


def _size(values: Sequence[int] | None, flag: str, parser: argparse.ArgumentParser) -> int | tuple[int, int] | None:
    if values is None:
        return None
    if len(values) > 2:
        parser.error(f"argument {flag}: expected one or two numbers, got {len(values)}")
    return values[0] if len(values) == 1 else (values[0], values[1])


def _number(kind: Callable[[str], float], accept: Callable[[float], bool], wanted: str) -> Callable[[str], Any]:
    """A type for argparse: what does not fit is wrong use, told with what was expected."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return value

    return parse


positive = _number(int, lambda value: value >= 1, "a whole number of at least 1")
non_negative = _number(int, lambda value: value >= 0, "a whole number of at least 0")
_share = _number(float, lambda value: 0 < value < 1, "a number between 0 and 1")
_share_or_all = _number(float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")
