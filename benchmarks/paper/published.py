"""The figures of Roth et al. 2022 (arXiv:2106.08265), in percent, MVTec AD and its mean unless said."""

from __future__ import annotations

# fmt: off
CLASSES = ("bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw", "tile", "toothbrush", "transistor", "wood",
           "zipper")
# fmt: on

# Of each row: image AUROC, pixel AUROC, PRO.
MEANS: dict[str, tuple[float | None, float | None, float | None]] = {
    "patchcore-100": (99.1, 98.0, 93.3),
    "patchcore-25": (99.1, 98.1, 93.4),
    "patchcore-10": (99.0, 98.1, 93.5),
    "patchcore-1": (99.0, 98.0, 93.1),
    "ivfpq-100": (98.0, 97.9, 93.0),
    "spade": (85.3, 96.6, 91.5),
    "padim": (95.4, 97.3, 91.8),
    "ensemble-1": (99.6, 98.2, 94.9),
    "wrn101-280-1": (99.4, 98.2, 94.4),
    "wrn101-280-123-1": (99.2, 98.4, 95.0),
    "stride-2": (97.6, None, None),
    "stride-3": (96.8, None, None),
    "resnet50-10": (99.0, 98.1, 93.3),
    "resnet50-1": (98.7, 97.8, 93.3),
    "wide_resnet50_2-10": (98.9, 98.1, 93.5),
    "wide_resnet50_2-1": (99.0, 98.0, 93.1),
    "resnet101-10": (98.6, 97.9, 92.5),
    "resnet101-1": (98.7, 97.8, 92.2),
    "wide_resnet101_2-10": (99.1, 98.2, 93.4),
    "wide_resnet101_2-1": (99.0, 98.0, 93.0),
    "resnext101_32x8d-10": (98.9, 98.0, 92.8),
    "resnext101_32x8d-1": (98.7, 97.8, 92.6),
}
MISCLASSIFIED = {"patchcore-25": 42, "patchcore-10": 47, "patchcore-1": 49}
SECONDS = {"patchcore-100": 0.60, "patchcore-10": 0.22, "patchcore-1": 0.17, "ivfpq-100": 0.20, "spade": 0.66, "padim": 0.19}  # an image, with backbone

# Published by others: image AUROC, pixel AUROC, PRO.
OTHERS = {
    "SPADE": (85.5, 96.0, 91.7),
    "PatchSVDD": (92.1, 95.7, None),
    "DifferNet": (94.9, None, None),
    "PaDiM": (95.3, 97.5, 92.1),
    "PaDiM, backbone chosen": (97.9, None, None),
    "Mahalanobis AD": (95.8, None, None),
    "Student": (None, None, 85.7),
}
OTHER_DATASETS = {
    "mtd": ("image AUROC", {"GANomaly": 76.6, "1-NN": 80.0, "DifferNet": 97.7, "PatchCore-10%": 97.9}),
    "mstc": ("pixel AUROC", {"CAVGA": 85.0, "SPADE": 89.9, "PaDiM": 91.2, "PatchCore-10%": 91.8}),
}


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


# Of each row and metric, in the order of CLASSES.
BY_CLASS: dict[tuple[str, str], tuple[float, ...]] = {
    ("patchcore-25", "image_auroc"): _numbers("100 99.5 98.1 98.7 98.2 100 100 100 96.6 98.1 98.7 100 100 99.2 99.4"),
    ("patchcore-10", "image_auroc"): _numbers("100 99.4 97.8 98.7 97.9 100 100 100 96.0 97.0 98.9 99.7 100 99.0 99.5"),
    ("patchcore-1", "image_auroc"): _numbers("100 99.3 98.0 98.0 98.6 100 100 99.7 97.0 96.4 99.4 100 99.9 99.2 99.2"),
    ("patchcore-25", "pixel_auroc"): _numbers("98.6 98.4 98.8 99.0 98.7 98.7 99.3 98.4 97.4 99.4 95.6 98.7 96.3 95.0 98.8"),
    ("patchcore-10", "pixel_auroc"): _numbers("98.6 98.5 98.9 99.1 98.7 98.7 99.3 98.4 97.6 99.4 95.9 98.7 96.4 95.1 98.9"),
    ("patchcore-1", "pixel_auroc"): _numbers("98.5 98.2 98.8 98.9 98.6 98.6 99.3 98.4 97.1 99.2 96.1 98.5 94.9 95.1 98.8"),
    ("patchcore-25", "aupro"): _numbers("96.2 92.5 95.5 96.6 96.0 93.8 98.9 91.4 93.2 97.9 87.3 91.5 83.7 89.4 97.1"),
    ("patchcore-1", "aupro"): _numbers("95.9 91.6 95.5 96.5 96.1 93.8 98.9 91.2 92.9 97.1 88.3 90.2 81.2 89.5 97.0"),
    ("patchcore-10", "aupro"): _numbers("96.1 92.6 95.5 96.6 95.9 93.9 98.9 91.3 94.1 97.9 87.4 91.4 83.5 89.6 97.1"),
    ("wrn101-280-1", "image_auroc"): _numbers("100 99.6 98.2 98.4 99.8 100 100 100 97.2 98.9 98.9 100 100 99.5 99.9"),
    ("wrn101-280-1", "pixel_auroc"): _numbers("98.6 98.4 99.1 98.7 98.7 98.8 99.3 98.8 97.8 99.3 96.1 98.8 96.4 95.1 98.9"),
    ("wrn101-280-1", "aupro"): _numbers("96.6 93.8 96.0 97.4 96.8 91.2 99.1 94.8 94.0 97.5 89.5 95.5 84.8 91.7 97.8"),
    ("wrn101-280-123-1", "image_auroc"): _numbers("100 99.7 98.1 98.2 98.3 100 100 100 97.1 99.0 98.9 98.9 99.7 99.9 99.7"),
    ("wrn101-280-123-1", "pixel_auroc"): _numbers("98.6 98.7 99.1 98.7 98.8 98.8 99.3 99.0 98.6 99.5 96.3 98.9 97.1 95.2 99.0"),
    ("wrn101-280-123-1", "aupro"): _numbers("96.6 94.6 96.3 97.5 97.0 91.5 99.1 95.4 96.0 98.1 90.0 95.8 85.9 92.0 98.0"),
}

# Of each method and metric, by shots 1 2 5 10 16 20 50; the deviations over seeds where they are given one by one.
LOW_SHOT: dict[tuple[str, str], tuple[float, ...]] = {
    ("spade", "image_auroc"): _numbers("71.6 73.4 75.2 77.5 78.9 79.6 81.1"),
    ("padim", "image_auroc"): _numbers("76.1 78.9 81.0 83.2 85.5 86.5 90.1"),
    ("patchcore-10", "image_auroc"): _numbers("83.4 86.4 90.8 93.6 95.4 95.8 97.5"),
    ("patchcore-25", "image_auroc"): _numbers("84.1 87.2 91.0 93.8 95.5 95.9 97.7"),
    ("spade", "pixel_auroc"): _numbers("91.9 93.1 94.5 95.4 95.7 95.7 96.2"),
    ("padim", "pixel_auroc"): _numbers("88.2 90.5 92.5 93.9 94.8 95.1 96.3"),
    ("patchcore-10", "pixel_auroc"): _numbers("92.0 93.1 94.8 96.2 96.8 96.9 97.8"),
    ("patchcore-25", "pixel_auroc"): _numbers("92.4 93.3 94.8 96.1 96.8 96.9 97.7"),
    ("spade", "aupro"): _numbers("83.5 85.8 88.3 89.6 90.1 90.1 90.8"),
    ("padim", "aupro"): _numbers("72.4 77.8 82.7 85.9 87.5 88.2 90.4"),
    ("patchcore-10", "aupro"): _numbers("82.4 85.1 88.7 90.9 91.8 92.0 93.0"),
    ("patchcore-25", "aupro"): _numbers("83.7 86.0 88.8 90.9 91.7 91.9 92.8"),
}
LOW_SHOT_DEVIATIONS: dict[str, tuple[float, ...]] = {
    "spade": _numbers("0.7 1.3 1.5 1.1 0.9 0.8 0.4"),
    "padim": _numbers("0.4 0.6 0.2 0.7 0.6 0.3 0.3"),
    "patchcore-10": _numbers("0.6 0.9 0.8 0.6 0.7 0.6 0.3"),
    "patchcore-25": _numbers("0.7 1.0 0.9 0.5 0.6 0.6 0.4"),
}
