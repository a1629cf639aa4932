"""Every row of the study as a small named configuration; section, table and figure numbers are those of Roth et al. 2022 as far as this project knows them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

SHOTS = (1, 2, 5, 10, 16, 20, 50)
BASE = "base"  # stands for the study's --backbone; in the paper WideResNet50
SIZES = (280, 288, 320, 360, 448)
HIERARCHIES = ((1,), (2,), (3,), (1, 2), (2, 3), (1, 2, 3))
STUDIED_BACKBONES = ("resnet50", "wide_resnet50_2", "resnet101", "wide_resnet101_2", "resnext101_32x8d", "densenet201", "efficientnet_lite0", "resnet18")


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        name: what --rows takes.
        title: what tables show.
        groups: the tables and figures that show it.
        method: "patchcore", "random", "proxies", "ivfpq", "spade", "padim" or "ensemble".
        ratio: share of the patches that a sampler keeps.
        backbone: a network's name, or BASE.
        layers: numbers of the hierarchies; None: those of the data set's protocol, 2 and 3.
        size: side of the network's input in pixels; None: that of the protocol, 224.
        patch_size: p of Eq. (1).
        stride: s of Eq. (3).
        shots: number of nominal images; None: all.
        seeded: run with as many seeds as --seeds says; else with seed 0.
        pixels: measure pixels on every data set; else only where the protocol does.
        members: backbones of an ensemble.
        variant: another split of the data set than its protocol's, where it has one.
        options: of the method.
    """

    name: str
    title: str
    groups: tuple[str, ...]
    method: str = "patchcore"
    ratio: float = 0.01
    backbone: str = BASE
    layers: tuple[int, ...] | None = None
    size: int | None = None
    patch_size: int = 3
    stride: int = 1
    shots: int | None = None
    seeded: bool = False
    pixels: bool = False
    members: tuple[str, ...] = ()
    variant: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def _percent(ratio: float) -> str:
    return f"{100 * ratio:g}"


def _samplers() -> list[Row]:
    """Tables 1 to 3, S1 to S3, and the figure of the share that is kept."""
    main = ("main", "retention", "times")
    rows = [Row(f"patchcore-{_percent(r)}", f"PatchCore-{_percent(r)}%", main, ratio=r, pixels=True, seeded=r <= 0.01) for r in (1, 0.25, 0.1, 0.01)]
    rows.append(Row("patchcore-0.1", "PatchCore-0.1%", ("retention",), ratio=0.001, seeded=True))
    rows += [Row(f"random-{_percent(r)}", f"random {_percent(r)}%", ("retention",), "random", r, seeded=r <= 0.01) for r in (0.25, 0.1, 0.01, 0.001)]
    for ratio in (0.01, 0.001):
        rows.append(Row(f"proxies-{_percent(ratio)}", f"learned proxies {_percent(ratio)}%", ("retention",), "proxies", ratio))
    printed = {"sign": 1}
    rows.append(Row("proxies-printed-1", "learned proxies 1%, Eq. (8) as printed", ("retention",), "proxies", 0.01, options=printed))
    return rows


def _rivals() -> list[Row]:
    groups = ("main", "times")
    pyramid: dict[str, Any] = {"layers": (1, 2, 3), "patch_size": 1, "stride": 2}  # 28 x 28 places, as PatchCore has them
    return [
        Row("spade", "SPADE", groups, "spade", **pyramid),
        Row("padim", "PaDiM", groups, "padim", pixels=True, **pyramid),
        Row("ivfpq-100", "PatchCore-100% + IVFPQ", groups, "ivfpq", 1, pixels=True),
    ]


def _larger() -> list[Row]:
    """Table 4 and S6: larger images, larger networks, ensembles."""
    wide, groups = "wide_resnet101_2", ("larger",)
    trio = ("densenet201", "resnext101_32x8d", wide)
    pair = (BASE, "efficientnet_lite0")
    return [
        Row("ensemble-1", "320 px, DenseNet201 + ResNeXt101 + WRN101", groups, "ensemble", size=320, members=trio, pixels=True),
        Row("wrn101-280-1", "280 px, WRN101 (2+3)", groups, backbone=wide, layers=(2, 3), size=280, pixels=True),
        Row("wrn101-280-123-1", "280 px, WRN101 (1+2+3)", groups, backbone=wide, layers=(1, 2, 3), size=280, pixels=True),
        Row("base-280-1", "280 px, base (2+3)", ("larger", "size"), size=280),
        Row("ensemble-pair-1", "base + EfficientNet-Lite0", groups, "ensemble", members=pair, pixels=True),
        Row(
            "ensemble-pair-minmax-1",
            "the same, min-max over the test set (sees the test images)",
            groups,
            "ensemble",
            members=pair,
            pixels=True,
            options={"normalisation": "test min-max"},
        ),
    ]


def _ablations() -> list[Row]:
    """The figures of patch size, stride, hierarchies and image size, all at 1%; the row with the defaults of each is patchcore-1."""
    rows = [Row(f"patch-{p}", f"p = {p}", ("patch",), patch_size=p) for p in (1, 5, 7, 9)]
    rows += [Row(f"stride-{s}", f"stride {s}", ("stride",), stride=s) for s in (2, 3)]
    rows += [Row("layers-" + "".join(map(str, n)), " + ".join(map(str, n)), ("layers",), layers=n) for n in HIERARCHIES if n != (2, 3)]
    rows += [Row(f"size-{s}", f"{s} px", ("size",), size=s) for s in SIZES if s != 280]
    return rows


def _backbones() -> list[Row]:
    return [
        Row(f"{name}-{_percent(ratio)}", f"{name}, {_percent(ratio)}%", ("backbones",), ratio=ratio, backbone=name)
        for name in STUDIED_BACKBONES
        for ratio in (0.1, 0.01)
    ]


def _splits() -> list[Row]:
    """Table 6, for the magnetic tiles: what the split makes of the result."""
    groups, single = ("splits",), "split by single image"
    return [
        Row("patchcore-10-split-image", f"PatchCore-10%, {single}", groups, ratio=0.1, variant="image"),
        Row("patchcore-1-split-image", f"PatchCore-1%, {single}", groups, variant="image", seeded=True),
        Row("random-1-split-image", f"random 1%, {single}", groups, "random", variant="image", seeded=True),
        *(Row(f"patchcore-{_percent(r)}-split-given", f"PatchCore-{_percent(r)}%, the folders' split", groups, ratio=r, variant="given") for r in (0.1, 0.01)),
    ]


def _low_shot() -> list[Row]:
    """Table S5."""
    rows = {row.name: row for row in [*_samplers(), *_rivals()]}
    models = [rows[name] for name in ("patchcore-25", "patchcore-10", "spade", "padim")]
    return [replace(row, name=f"{row.name}-shots-{n}", groups=("low-shot",), shots=n, seeded=True, pixels=False) for row in models for n in SHOTS]


ROWS: dict[str, Row] = {row.name: row for row in [*_samplers(), *_rivals(), *_larger(), *_ablations(), *_backbones(), *_splits(), *_low_shot()]}


def rows_of(group: str) -> list[Row]:
    """The rows that a table or figure shows."""
    return [row for row in ROWS.values() if group in row.groups]


def chosen(names: list[str] | None) -> list[Row]:
    """Rows by their names, or by the names of groups; None: all.

    Raises:
        ValueError: an unknown name.
    """
    if names is None:
        return list(ROWS.values())
    found: dict[str, Row] = {}
    for name in names:
        group = {row.name: row for row in rows_of(name)}
        if name in ROWS:
            found[name] = ROWS[name]
        elif group:
            found |= group
        else:
            groups = sorted({group for row in ROWS.values() for group in row.groups})
            raise ValueError(f"paper: expected rows to be names that --list-rows prints or groups ({', '.join(groups)}), got {name!r}.")
    return list(found.values())
