"""The command line: ``patchcore-ext fit | predict | info``, also ``python -m patchcore_ext``.

Exit status: 0, 1 (failed: one line on stderr says why), 2 (wrong use), 130 (Ctrl-C).
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch

from ._library import build_info
from ._results import MAP_FORMATS, ResultFolder
from ._version import __version__
from .images import list_images
from .memory_bank import check_output_path
from .patchcore import PatchCore

__all__ = ["main"]

_log = logging.getLogger("patchcore_ext")
_PROGRAM = "patchcore-ext"
_FAILED, _WRONG_USE, _INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; None: those of the process.

    Returns:
        The exit status: 0, 1 after a failure that a person can mend, or 130 after Ctrl-C.

    Raises:
        SystemExit: with status 2 for wrong use, and with 0 after --help and --version.
    """
    # Spares the exit the search for garbage in all that torch has loaded: a second, which Ctrl-C should not take.
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        # A file name that the terminal cannot show must not end the run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments = _parser().parse_args(argv)
        with _log_on_stderr(arguments.quiet):
            arguments.run(arguments)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print(f"{_PROGRAM}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`... | head`); point stdout elsewhere, or Python complains while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except (ValueError, TypeError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"{_PROGRAM}: error: {_one_line(error)}", file=sys.stderr)
        return _FAILED


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in two lines, without the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(_WRONG_USE, f"{_PROGRAM}: error: {message}\nSee {self.prog} --help.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=_PROGRAM, description="Finds anomalies in images after seeing good ones only (PatchCore).")
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="auto", help="where the network runs: auto, cpu, cuda or cuda:N (default: auto)")
    common.add_argument("--seed", type=_non_negative, default=0, help="seed of what is random, all of it in fit (default: 0)")
    common.add_argument("--quiet", action="store_true", help="no progress and no messages except errors")
    _add_fit(commands, common)
    _add_predict(commands, common)
    _add_info(commands, common)
    return parser


def _add_fit(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("fit", parents=[common], help="learn from good images", description="Makes a model from good images.")
    parser.add_argument("data", metavar="DATA", help="folder with images of good parts, searched with its subfolders, or one image")
    parser.add_argument("-o", "--output", metavar="MODEL", required=True, help="model file to write (.safetensors)")
    parser.add_argument("--backbone", default="wide_resnet50_2", help="torchvision network (default: %(default)s)")
    parser.add_argument("--weights", default="DEFAULT", help="torchvision weights name or state-dict file (default: torchvision's best)")
    parser.add_argument("--layers", nargs="+", default=["layer2", "layer3"], metavar="NAME", help="layers to use (default: layer2 layer3)")
    parser.add_argument("--resize", nargs="+", type=_positive, default=[256, 256], metavar="N", help="short side, or height and width (default: 256 256)")
    parser.add_argument("--crop", nargs="+", type=_positive, metavar="N", help="centre crop: side, or height and width (default: none)")
    parser.add_argument("--coreset-ratio", type=_share_or_all, default=0.1, metavar="R", help="share of patches to keep (default: 0.1)")
    parser.add_argument("--num-neighbors", type=_positive, default=9, metavar="B", help="neighbours in the image score (default: 9)")
    parser.add_argument(
        "--false-alarm-rate",
        type=_share,
        default=0.01,
        metavar="R",
        help="tolerated share of good images called anomalous (default: 0.01)",
    )
    parser.add_argument("--include-backbone", action="store_true", help="store the network's weights in the model file, too")
    parser.set_defaults(run=lambda arguments: _fit(arguments, parser))


def _add_predict(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("predict", parents=[common], help="score images", description="Scores images with a model that fit made.")
    parser.add_argument("model", metavar="MODEL", help="model file")
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="folders (searched with their subfolders) or images")
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="folder for tables, heat maps and report.html (without it a table is printed)",
    )
    parser.add_argument("--threshold", type=float, metavar="X", help="call images above this score anomalous (default: the model's own)")
    parser.add_argument("--save-maps", choices=MAP_FORMATS, help="write raw anomaly maps into DIR/maps")
    parser.add_argument("--weights", help="where the network's weights are now: state-dict file or torchvision name (default: as in fit)")
    parser.set_defaults(run=lambda arguments: _predict(arguments, parser))


def _add_info(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("info", parents=[common], help="show the build", description="Shows version, CPU level and CUDA state.")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_info)


def _fit(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    resize, crop = _size(arguments.resize, "--resize", parser), _size(arguments.crop, "--crop", parser)
    # Both before the long work, and before weights are fetched.
    check_output_path(arguments.output)
    paths = list_images(arguments.data)
    model = PatchCore(
        arguments.backbone,
        arguments.layers,
        weights=arguments.weights,
        coreset_ratio=arguments.coreset_ratio,
        num_neighbors=arguments.num_neighbors,
        resize=resize,
        crop=crop,
        device=arguments.device,
        seed=arguments.seed,
    )
    started = time.perf_counter()
    _log.info("Fitting %s on %d images, network on %s.", model.extractor.backbone_name, len(paths), model.device)
    model.fit(paths, false_alarm_rate=arguments.false_alarm_rate, progress=_progress(arguments))
    model.save(arguments.output, include_backbone=arguments.include_backbone)
    if not arguments.quiet:
        print(
            f"{arguments.output}: {len(model.bank)} patches x {model.bank.dim} of {len(paths)} images, threshold {model.threshold:.6g}, "
            f"{os.path.getsize(arguments.output) / 1e6:.1f} MB, {time.perf_counter() - started:.1f} s"
        )


def _predict(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.save_maps and arguments.output is None:
        parser.error("--save-maps needs -o DIR")
    paths = _images_outside(arguments.images, arguments.output)
    model = PatchCore.load(arguments.model, arguments.device, weights=arguments.weights)
    threshold = model.threshold if arguments.threshold is None else arguments.threshold
    if arguments.output is None:
        _print_table(model, paths, threshold, arguments)
        return
    predictions = model.predict(paths, threshold=threshold, progress=_progress(arguments))
    # The model's own threshold even if another is given: the colours of several runs can be compared.
    folder = ResultFolder(arguments.output, paths, threshold=threshold, color_scale=model.threshold, save_maps=arguments.save_maps)
    for prediction in predictions:
        folder.add(prediction)
    settings = model.settings
    page = folder.finish(
        arguments.model,
        {
            "Model": os.path.basename(arguments.model),
            "Threshold": f"{threshold:.6g}" + ("" if arguments.threshold is None else " (given by hand)"),
            "Backbone": f"{model.extractor.backbone_name}, {' + '.join(settings['layers'])}",
            "Memory bank": f"{len(model.bank)} patches x {model.bank.dim} of {model.fit_report['num_images']} good images",
        },
        model.fit_report.get("covering_curve", []),
    )
    if not arguments.quiet:
        print(page)


def _print_table(model: PatchCore, paths: Sequence[str], threshold: float, arguments: argparse.Namespace) -> None:
    width = max(len(path) for path in paths)
    print(f"{'path':<{width}}  {'score':>10}  verdict")
    num_anomalous = 0
    # On a terminal the lines themselves are the progress.
    progress = False if sys.stdout.isatty() else _progress(arguments)
    for prediction in model.predict(paths, threshold=threshold, progress=progress):
        verdict = "anomalous" if prediction.is_anomalous else "good"
        num_anomalous += prediction.is_anomalous
        print(f"{prediction.path:<{width}}  {prediction.score:>10.6g}  {verdict}", flush=True)
    if not arguments.quiet:
        print(f"{_PROGRAM}: {num_anomalous} of {len(paths)} images above the threshold {threshold:.6g}", file=sys.stderr)


def _info(arguments: argparse.Namespace) -> None:
    info = build_info()
    if arguments.json:
        print(json.dumps(info, indent=2, sort_keys=True))
        return
    width = max(len(key) for key in info)
    for key, value in info.items():
        print(f"{key:<{width}}  {value}")


def _images_outside(sources: Sequence[str], output: str | None) -> list[str]:
    """All images of the sources, without those below the output folder: the heat maps of an earlier run are no input."""
    paths = [path for source in sources for path in list_images(source)]
    if output is None:
        return paths
    below = os.path.join(os.path.realpath(output), "")
    outside = [path for path in paths if not os.path.realpath(path).startswith(below)]
    if not outside:
        raise ValueError(f"expected images outside the output folder {output!r}, got none; write the results to another folder.")
    return outside


def _size(values: Sequence[int] | None, flag: str, parser: argparse.ArgumentParser) -> int | tuple[int, int] | None:
    if values is None:
        return None
    if len(values) > 2:
        parser.error(f"argument {flag}: expected one or two numbers, got {len(values)}")
    return values[0] if len(values) == 1 else (values[0], values[1])


def _progress(arguments: argparse.Namespace) -> bool | None:
    return False if arguments.quiet else None


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


_positive = _number(int, lambda value: value >= 1, "a whole number of at least 1")
_non_negative = _number(int, lambda value: value >= 0, "a whole number of at least 0")
_share = _number(float, lambda value: 0 < value < 1, "a number between 0 and 1")
_share_or_all = _number(float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


@contextlib.contextmanager
def _log_on_stderr(quiet: bool) -> Iterator[None]:
    """The package's log messages on stderr for the time of one command."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{_PROGRAM}: %(message)s"))
    level = _log.level
    _log.addHandler(handler)
    _log.setLevel(logging.ERROR if quiet else logging.INFO)
    try:
        yield
    finally:
        _log.setLevel(level)
        _log.removeHandler(handler)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
