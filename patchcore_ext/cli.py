"""The command line: ``patchcore-ext fit | predict | evaluate | inspect | info``, also ``python -m patchcore_ext``.

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
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch

from . import _cli_evaluate, _cli_inspect
from ._cli_options import PROGRAM, add_model_flags, model_settings, non_negative, progress_of
from ._evaluation_results import printable
from ._library import build_info
from ._results import MAP_FORMATS, ResultFolder
from ._version import __version__
from .images import list_images
from .layout import training_folder
from .memory_bank import check_output_path
from .patchcore import PatchCore

__all__ = ["main"]

_log = logging.getLogger("patchcore_ext")
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
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`... | head`); point stdout elsewhere, or Python complains while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except (ValueError, TypeError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"{PROGRAM}: error: {_one_line(error)}", file=sys.stderr)
        return _FAILED


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in two lines, without the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(_WRONG_USE, f"{PROGRAM}: error: {message}\nSee {self.prog} --help.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Finds anomalies in images after seeing good ones only (PatchCore).")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="auto", help="where the network runs: auto, cpu, cuda or cuda:N (default: auto)")
    common.add_argument("--seed", type=non_negative, default=0, help="seed of what is random, all of it in fit (default: 0)")
    common.add_argument("--quiet", action="store_true", help="no progress and no messages except errors")
    _add_fit(commands, common)
    _add_predict(commands, common)
    _cli_evaluate.add_command(commands, common)
    _cli_inspect.add_command(commands, common)
    _add_info(commands, common)
    return parser


def _add_fit(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("fit", parents=[common], help="learn from good images", description="Makes a model from good images.")
    parser.add_argument(
        "data", metavar="DATA", help="folder with images of good parts, searched with its subfolders (of a class of a dataset: train/good), or one image"
    )
    parser.add_argument("-o", "--output", metavar="MODEL", required=True, help="model file to write (.safetensors)")
    add_model_flags(parser)
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
    settings = model_settings(arguments, parser)
    # Both before the long work, and before weights are fetched.
    check_output_path(arguments.output)
    paths = list_images(training_folder(arguments.data))
    model = PatchCore(**settings)
    started = time.perf_counter()
    _log.info("Fitting %s on %d images, network on %s.", model.extractor.backbone_name, len(paths), model.device)
    model.fit(paths, false_alarm_rate=arguments.false_alarm_rate, progress=progress_of(arguments))
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
    unreadable = _Unreadable()
    predictions = model.predict(paths, threshold=threshold, progress=progress_of(arguments), on_unreadable=unreadable)
    # The model's own threshold even if another is given: the colours of several runs can be compared.
    folder = ResultFolder(arguments.output, paths, threshold=threshold, color_scale=model.threshold, save_maps=arguments.save_maps)
    for prediction in predictions:
        folder.add(prediction)
    if len(unreadable.paths) == len(paths):
        unreadable.complain(len(paths))
    settings = model.settings
    page = folder.finish(
        arguments.model,
        {
            "Model": os.path.basename(arguments.model),
            "Threshold": f"{threshold:.6g}" + ("" if arguments.threshold is None else " (given by hand)"),
            "Backbone": f"{model.extractor.backbone_name}, {' + '.join(settings['layers'])}",
            "Memory bank": f"{len(model.bank)} patches x {model.bank.dim} of {model.fit_report['num_images']} good images",
            **({"Left out": f"{len(unreadable.paths)} images that cannot be read"} if unreadable.paths else {}),
        },
        model.fit_report.get("covering_curve", []),
        unreadable=unreadable.paths,
    )
    if not arguments.quiet:
        print(page)
    unreadable.complain(len(paths))


def _print_table(model: PatchCore, paths: Sequence[str], threshold: float, arguments: argparse.Namespace) -> None:
    unreadable = _Unreadable()
    width = max(len(printable(path)) for path in paths)
    print(f"{'path':<{width}}  {'score':>10}  verdict")
    num_anomalous = 0
    # On a terminal the lines themselves are the progress.
    progress = False if sys.stdout.isatty() else progress_of(arguments)
    for prediction in model.predict(paths, threshold=threshold, progress=progress, on_unreadable=unreadable):
        verdict = "anomalous" if prediction.is_anomalous else "good"
        num_anomalous += prediction.is_anomalous
        print(f"{printable(prediction.path):<{width}}  {prediction.score:>10.6g}  {verdict}", flush=True)
    if not arguments.quiet:
        print(f"{PROGRAM}: {num_anomalous} of {len(paths)} images above the threshold {threshold:.6g}", file=sys.stderr)
    unreadable.complain(len(paths))


class _Unreadable:
    """Images that cannot be read: each is named as it comes and left out, and the command fails in the end."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def __call__(self, path: str, error: ValueError) -> None:
        self.paths.append(path)
        _log.error("%s", printable(str(error)))

    def complain(self, num_images: int) -> None:
        if self.paths:
            raise ValueError(f"expected images that can be read, got {len(self.paths)} of {num_images} that cannot be; the results leave them out.")


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


@contextlib.contextmanager
def _log_on_stderr(quiet: bool) -> Iterator[None]:
    """The package's log messages on stderr for the time of one command."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{PROGRAM}: %(message)s"))
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
