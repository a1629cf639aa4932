"""The report page; what its script does is tested in test_report_browser.py."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import setuptools
import torch
from setuptools.config.pyprojecttoml import apply_configuration
from sklearn.datasets import load_sample_image

from patchcore_ext.report import Report, ReportEntry, default_color_range, heat_map_image, write_report

NASTY = "a\"b'</script><script>alert(1)</script><!--&amp;{{ 7 * 7 }}\n\u202e\u2028é" + "\udcff"
NASTY_SHOWN = NASTY.replace("\n", "\\n").replace("\u202e", "\\u202e").replace("\u2028", "\\u2028").replace("\udcff", "\\udcff")
VOID = {"meta", "img", "br", "link", "input", "hr"}


def entry_of(score: float, path: str = "image.png", *, value: float | None = None, grey: int = 128, threshold: float = 1.0, **known: Any) -> ReportEntry:
    image, heat_map = PIL.Image.new("L", (12, 8), grey), torch.full((8, 12), score if value is None else value)
    return ReportEntry(path, score, score > threshold, image, heat_map, **known)


def page_of(folder: Path, entries: list[ReportEntry], **options: Any) -> str:
    settings: dict[str, Any] = {"title": "A title", "summary": {"Backbone": "some"}, "threshold": 1.0, **options}
    write_report(folder / "report.html", entries, **settings)
    return (folder / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Checks that every element is closed in order and collects what the page shows."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def named(self, tag: str, attribute: str) -> list[str]:
        return [str(attrs[attribute]) for name, attrs in self.elements if name == tag and attribute in attrs]

    def images(self) -> list[PIL.Image.Image]:
        sources = self.named("img", "src")
        assert all(source.startswith("data:image/webp;base64,") for source in sources)
        return [PIL.Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1], validate=True))) for source in sources]

    def run(self) -> dict[str, Any]:
        scripts = [text for tag, text in self.texts if tag == "script"]
        assert len(scripts) == 2
        run: dict[str, Any] = json.loads(scripts[0])
        return run


def scores_on(page: str) -> list[str]:
    return re.findall(r'class="score">([^<]*)<', page)


def test_page_is_well_formed_and_needs_nothing_else(tmp_path: Path) -> None:
    mask = np.ones((8, 12), dtype=bool)
    text = page_of(tmp_path, [entry_of(0.5, is_defective=False), entry_of(2.5, defect="crack", is_defective=True, mask=mask)], metrics={"AUROC": 1.0})
    assert text.startswith("<!DOCTYPE html>\n")
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert {"html", "head", "title", "style", "dl", "figure", "figcaption", "img", "dialog", "svg", "script"} <= tags
    assert not tags & {"link", "iframe", "object", "embed", "base"}
    assert not re.search(r"https?:|url\(|@import|\bimport\b|\bfetch\b|XMLHttpRequest|WebSocket|\son\w+=", text)
    assert {name for _, attrs in page.elements for name in attrs} & {"href", "srcset", "action", "srcdoc"} == set()
    assert page.named("script", "src") == []
    assert "viewport" in page.named("meta", "name")
    assert [image.size for image in page.images()] == [(12, 8)] * 4


def test_thumbnails_have_fixed_sizes_texts_and_load_lazily(tmp_path: Path) -> None:
    page = Page(page_of(tmp_path, [entry_of(0.5, "a.png"), entry_of(2.5, "b.png")]))
    pictures = [attrs for tag, attrs in page.elements if tag == "img" and "src" in attrs]
    assert [attrs["alt"] for attrs in pictures] == ["b.png", "heat map of b.png", "a.png", "heat map of a.png"]
    assert all((attrs["loading"], attrs["width"], attrs["height"]) == ("lazy", "12", "8") for attrs in pictures)


def test_only_the_own_script_may_run(tmp_path: Path) -> None:
    text = page_of(tmp_path, [entry_of(0.5)])
    policy = Page(text).named("meta", "content")[1]
    script = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_page_without_images_is_well_formed(tmp_path: Path) -> None:
    page = Page(page_of(tmp_path, [], summary={}))
    assert ("p", "No images.") in page.texts
    assert page.run() == {"threshold": 1.0, "scores": {"good": [], "defective": [], "unknown": []}, "cards": []}


def test_everything_is_escaped(tmp_path: Path) -> None:
    entries = [entry_of(0.5, NASTY, defect=NASTY, is_defective=True), entry_of(0.4, is_defective=False)]
    text = page_of(tmp_path, entries, title=NASTY, summary={NASTY: NASTY}, metrics={NASTY: 0.5})
    page = Page(text)
    assert text.count("<script") == text.count("</script") == 2
    assert "alert(1)</" not in text
    assert "<!--" not in text
    for tag in ("title", "h1", "dt", "dd", "span"):
        assert (tag, NASTY_SHOWN) in page.texts
    assert [text for tag, text in page.texts if tag == "dt"] == [NASTY_SHOWN] * 2
    assert f"heat map of {NASTY_SHOWN}" in page.named("img", "alt")
    assert f"Enlarge {NASTY_SHOWN}, score 0.5" in page.named("button", "aria-label")
    # A filter finds its cards by this name.
    assert NASTY_SHOWN in page.named("input", "value")
    assert page.run()["cards"][0]["group"] == NASTY_SHOWN


def test_highest_scores_come_first_and_equal_ones_keep_their_order(tmp_path: Path) -> None:
    entries = [entry_of(score, name) for score, name in ((0.5, "a"), (2.0, "b"), (0.5, "c"), (3.0, "d"), (2.0, "e"))]
    text = page_of(tmp_path, entries)
    assert scores_on(text) == ["3", "2", "2", "0.5", "0.5"]
    assert re.findall(r'class="name"[^>]*>([^<]*)<', text) == ["d", "b", "e", "a", "c"]
    assert re.findall(r'class="verdict">([^<]*)<', text) == ["anomalous"] * 3 + ["good"] * 2


def test_what_is_not_shown_is_counted(tmp_path: Path) -> None:
    report = Report(1.0, limit=3)
    for index in range(10):
        report.add(entry_of(index / 4, f"{index}.png", is_defective=index % 2 == 1 if index < 8 else None))
    assert len(report) == 10
    report.write(tmp_path / "report.html", title="Ten")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert scores_on(text) == ["2.25", "2", "1.75"]
    assert "The 3 images with the highest scores; 7 more are counted above and not shown." in text
    assert "4 good, 4 defective, 2 unknown" in re.sub(r"\s+", " ", text)
    run = Page(text).run()
    assert run["scores"] == {"good": [0.0, 0.5, 1.0, 1.5], "defective": [0.25, 0.75, 1.25, 1.75], "unknown": [2.0, 2.25]}
    assert [(card["score"], card["truth"], card["group"]) for card in run["cards"]] == [
        (2.25, "unknown", "unknown"),
        (2.0, "unknown", "unknown"),
        (1.75, "defective", "defective"),
    ]


@pytest.mark.parametrize("limit", [0, 1])
def test_small_limits(tmp_path: Path, limit: int) -> None:
    report = Report(1.0, limit=limit)
    for score in (0.5, 0.5, 0.7, 0.6):
        report.add(entry_of(score))
    report.write(tmp_path / "report.html", title="Few")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert scores_on(text) == ["0.7"][:limit]
    assert f"{4 - limit} more are counted above" in text


def test_a_thousand_images_stay_below_thirty_megabytes(tmp_path: Path) -> None:
    # Photographs with colours and much detail; what inspection cameras see is plainer.
    photograph = PIL.Image.fromarray(load_sample_image("flower.jpg")).crop((100, 0, 527, 427))
    entry = ReportEntry("image.png", 0.5, False, photograph, torch.linspace(0, 2, 427).expand(427, 427))
    alone = len(page_of(tmp_path, [entry]))
    empty = len(page_of(tmp_path, []))
    assert 1000 * (alone - empty) < 30e6
    text = page_of(tmp_path, [entry_of(index / 1000, f"{index}.png") for index in range(1001)])
    assert scores_on(text) == [f"{index / 1000:.4g}" for index in range(1000, 0, -1)]
    assert "1 more are counted" in text


def test_kinds_can_be_chosen_when_there_are_several(tmp_path: Path) -> None:
    several = [entry_of(1.5, is_defective=True, defect="crack"), entry_of(0.5, is_defective=False), entry_of(0.7, defect="burr", is_defective=True)]
    assert Page(page_of(tmp_path, several)).named("input", "value")[1:] == ["missed", "false alarm", "correct", "good", "burr", "crack"]
    assert Page(page_of(tmp_path, [entry_of(0.5)])).named("input", "value")[1:] == ["flagged", "passed"]


def test_metrics_are_shown(tmp_path: Path) -> None:
    metrics = {"Image AUROC": 0.97, "Pixel AUROC": None, "AUPRO": float("nan"), "Misclassified": 12, "F1 threshold": 27.54321}
    texts = Page(page_of(tmp_path, [entry_of(0.5)], metrics=metrics)).texts
    assert [text for tag, text in texts if tag == "dt"] == [*metrics, "Backbone"]
    assert [text for tag, text in texts if tag == "dd"] == ["0.9700", "n/a", "n/a", "12", "27.5432", "some"]


def bars_of(text: str) -> list[tuple[str, float, float, float]]:
    found = re.findall(r'<rect class="(\w+)" x="([\d.]+)" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', text)
    return [(truth, float(left), float(top), float(height)) for truth, left, top, height in found]


def test_histogram_stacks_what_is_known(tmp_path: Path) -> None:
    known = [False, False, True, None, True]
    text = page_of(tmp_path, [entry_of(score, is_defective=truth) for score, truth in zip((0.5, 0.5, 0.5, 0.5, 1.5), known, strict=True)])
    bars = sorted(bars_of(text), key=lambda bar: (bar[1], -bar[2]))
    assert [bar[0] for bar in bars] == ["good", "defective", "unknown", "defective"]
    assert [bar[2:] for bar in bars] == [(50, 50), (25, 25), (0, 25), (75, 25)]
    line = re.search(r'id="line" style="left: ([\d.]+)%"', text)
    assert line is not None
    assert float(line.group(1)) == pytest.approx(50, abs=0.1)


def test_histogram_holds_a_threshold_outside_of_the_scores(tmp_path: Path) -> None:
    for threshold in (-3.0, 0.5, 7.0):
        text = page_of(tmp_path, [entry_of(0.5, threshold=threshold)] * 2, threshold=threshold)
        line = re.search(r'id="line" style="left: ([\d.]+)%"', text)
        assert line is not None
        assert 0 < float(line.group(1)) < 100
        assert [bar[3] for bar in bars_of(text)] == [100]


@pytest.mark.parametrize("score", [0.0, 1.0, 1e17, 3e38, 1e-30])
def test_scores_that_hardly_differ_make_a_histogram(tmp_path: Path, score: float) -> None:
    scores = [score, float(np.nextafter(score, np.inf))]
    text = page_of(tmp_path, [entry_of(value, value=0.5, threshold=score) for value in scores], threshold=score)
    assert sum(bar[3] for bar in bars_of(text)) in (100, 200)
    assert "nan" not in re.findall(r'id="line" style="[^"]*"', text)[0]


def test_numbers_of_numpy_are_welcome(tmp_path: Path) -> None:
    image, mask = PIL.Image.new("L", (12, 8)), torch.ones(8, 12).bool()
    entry = ReportEntry("a.png", np.float32(2), np.bool_(True), image, torch.zeros(8, 12), "crack", np.bool_(True), mask.numpy())  # type: ignore[arg-type]
    text = page_of(tmp_path, [entry], threshold=np.float32(1), metrics={"AUROC": np.float32(0.5)})
    assert Page(text).run()["scores"]["defective"] == [2.0]
    assert "<dd>0.5000</dd>" in text


@pytest.mark.parametrize(
    ("good", "defective", "area", "line"),
    [
        ([1, 2], [3, 4], 1.0, "0.0,100.0 0.0,50.0 0.0,0.0 50.0,0.0 100.0,0.0"),
        ([3, 4], [1, 2], 0.0, "0.0,100.0 50.0,100.0 100.0,100.0 100.0,50.0 100.0,0.0"),
        ([1, 1], [1, 1], 0.5, "0.0,100.0 100.0,0.0"),
        ([1, 3], [3, 4], 0.875, "0.0,100.0 0.0,50.0 50.0,0.0 100.0,0.0"),
    ],
)
def test_roc_curve(tmp_path: Path, good: list[float], defective: list[float], area: float, line: str) -> None:
    entries = [entry_of(score, is_defective=truth) for truth, part in ((False, good), (True, defective)) for score in part]
    text = page_of(tmp_path, entries)
    assert f"ROC curve, area {area:.4f}" in text
    assert f'<polyline points="{line}"/>' in text


def test_roc_curve_needs_both_kinds(tmp_path: Path) -> None:
    for known in (None, True, False):
        assert "ROC" not in page_of(tmp_path, [entry_of(0.5, is_defective=known), entry_of(0.6)])


def test_heat_maps_of_a_page_share_one_scale(tmp_path: Path) -> None:
    # The same distance must look the same beside any other image; no map is stretched on its own.
    together = Page(page_of(tmp_path, [entry_of(9.0, value=0.8), entry_of(8.0, value=1.4), entry_of(7.0, value=0.8)])).images()[1::2]
    alone = Page(page_of(tmp_path, [entry_of(7.0, value=0.8)])).images()[1]
    pixels = [np.asarray(image, dtype=int) for image in together]
    assert np.array_equal(pixels[0], pixels[2])
    assert np.array_equal(pixels[0], np.asarray(alone, dtype=int))
    assert np.abs(pixels[0] - pixels[1]).max() > 50


@pytest.mark.parametrize(
    ("threshold", "colors", "marks"),
    [
        (1.0, None, ["0.5", "threshold 1", "≥ 1.5"]),
        (1.0, (0.5, 1.75), ["0.5", "threshold 1", "≥ 1.75"]),
        (1.0, (0.9, 9.0), ["0.9", "≥ 9"]),
        (5.0, (0.0, 1.0), ["0", "≥ 1"]),
        (-1.0, None, ["0", "≥ 1"]),
    ],
)
def test_legend_tells_the_scale(tmp_path: Path, threshold: float, colors: tuple[float, float] | None, marks: list[str]) -> None:
    entry = entry_of(0.5, value=0.97, threshold=threshold)
    text = page_of(tmp_path, [entry], threshold=threshold, color_range=colors)
    assert re.findall(r'<span style="left: [^>]*>([^<]*)<', text) == marks
    low, high = default_color_range(threshold) if colors is None else colors
    heat_map = np.asarray(Page(text).images()[1], dtype=int)
    assert np.abs(heat_map - np.asarray(heat_map_image(entry.image, entry.heat_map, low, high), dtype=int)).max() <= 6


def test_large_images_become_thumbnails_with_their_shape(tmp_path: Path) -> None:
    mask = np.zeros((400, 1600), dtype=np.uint8)
    entry = ReportEntry("wide.png", 1.0, False, PIL.Image.new("RGB", (1600, 400)), torch.zeros(400, 1600), mask=mask)
    assert [image.size for image in Page(page_of(tmp_path, [entry])).images()] == [(320, 80)] * 2


def test_outline_reaches_the_page(tmp_path: Path) -> None:
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[20:40, 20:40] = 255
    image, heat_map = PIL.Image.new("L", (64, 64), 128), torch.zeros(64, 64)

    def greenness(mask: np.ndarray[Any, Any] | None) -> float:
        page = Page(page_of(tmp_path, [ReportEntry("image.png", 2.0, True, image, heat_map, "crack", True, mask)]))
        assert ("image.png, defect outlined" in page.named("img", "alt")) == (mask is not None and bool(mask.any()))
        pixels = np.asarray(page.images()[0].convert("RGB"), dtype=int)
        return float((pixels[..., 1] - pixels[..., 0]).max())

    assert greenness(mask) > 100
    assert greenness(None) == greenness(np.zeros_like(mask)) == 0


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK", "F", "I", "I;16"])
@pytest.mark.parametrize("size", [(12, 8), (1, 1), (640, 1)])
def test_every_mode_and_size_of_image_is_shown(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    image, mask = PIL.Image.new(mode, size), np.ones(size[::-1], dtype=bool)
    entry = ReportEntry("image.png", 1.0, False, image, torch.zeros(size[::-1]), mask=mask)
    assert [shown.size for shown in Page(page_of(tmp_path, [entry])).images()] == [(min(size[0], 320), size[1])] * 2


def test_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = page_of(tmp_path, [entry_of(0.5)])

    def fail(self: Path, text: str, **options: object) -> int:
        with self.open("w", encoding="utf-8") as file:
            file.write(text[: len(text) // 2])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        page_of(tmp_path, [entry_of(0.7)])
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": float("nan")}, "Report.add: expected the score of 'x.png' to be a finite number, got nan."),
        ({"heat_map": torch.zeros(12, 8)}, "Report.add: expected the heat map of 'x.png' to be of the image's size [8, 12], got [12, 8]."),
        ({"heat_map": torch.full((8, 12), float("inf"))}, "Report.add: expected the heat map of 'x.png' to be finite, got NaN or infinity in it."),
        ({"mask": np.ones((8, 12, 3))}, "Report.add: expected the mask of 'x.png' to be of the image's size [8, 12], got [8, 12, 3]."),
        ({"is_anomalous": True}, "Report.add: expected is_anomalous of 'x.png' to be False for score 0.5 and threshold 1.0, got True."),
    ],
)
def test_bad_entry_is_named_and_leaves_the_old_page(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    before = page_of(tmp_path, [entry_of(0.5)])
    entry = {"path": "x.png", "score": 0.5, "is_anomalous": False, "image": PIL.Image.new("L", (12, 8)), "heat_map": torch.zeros(8, 12), **changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        page_of(tmp_path, [entry_of(0.7), ReportEntry(**entry)])
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


def test_bad_entry_is_not_counted() -> None:
    report = Report(1.0)
    with pytest.raises(ValueError, match="to be a finite number"):
        report.add(entry_of(float("inf")))
    assert len(report) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": float("inf")}, "Report: expected threshold to be a finite number, got inf."),
        ({"threshold": 1.0, "color_range": (2.0, 2.0)}, "Report: expected color_range to be two finite numbers, the lower first, got 2.0 and 2.0."),
        ({"threshold": 1.0, "limit": -1}, "Report: expected limit to be 0 or more, got -1."),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Report(**options)


def test_covering_curve_is_drawn_when_there_is_one(tmp_path: Path) -> None:
    text = page_of(tmp_path, [entry_of(1.0)], covering_curve=[(1, 8.0), (10, 4.0), (1000, 0.0)])
    assert '<polyline points="0.0,0.0 33.3,50.0 100.0,100.0"/>' in text  # a logarithmic axis; downwards on the page
    assert "Coreset: 1,000 patches" in text
    assert "<span>1 patch: radius 8</span>" in text
    assert "<span>1,000: 0</span>" in text
    for nothing in ([], [(5, 1.0)]):
        assert "<polyline" not in page_of(tmp_path, [entry_of(1.0)], covering_curve=nothing)


def test_templates_go_into_the_package_and_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    distribution = setuptools.Distribution()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apply_configuration(distribution, "pyproject.toml")
    command: Any = distribution.get_command_obj("build_py")
    command.finalize_options()
    command.manifest_files = {}
    carried = {Path(name).name for name in command.find_data_files("patchcore_ext", "patchcore_ext")}
    assert carried >= {"py.typed", "report.html", "report.css", "report.js"}
    assert "recursive-include patchcore_ext/templates *" in (root / "MANIFEST.in").read_text()
