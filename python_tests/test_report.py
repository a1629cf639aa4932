"""Heat maps and the report page."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from patchcore_ext.report import ReportEntry, default_color_range, heat_map_image, write_report

NASTY = "a\"b'<script>alert(1)</script>&amp;\n\u202eé" + "\udcff"
VOID = {"meta", "img", "br", "link", "input", "hr"}


def entry_of(score: float, path: str = "image.png", *, value: float | None = None, label: str | None = None, grey: int = 128) -> ReportEntry:
    return ReportEntry(path, score, score > 1.0, PIL.Image.new("L", (12, 8), grey), torch.full((8, 12), score if value is None else value), label)


def page_of(folder: Path, entries: list[ReportEntry], **options: object) -> str:
    settings: dict[str, object] = {"title": "A title", "summary": {"Images": "3"}, "threshold": 1.0, **options}
    write_report(folder / "report.html", entries, **settings)  # type: ignore[arg-type]
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

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    def named(self, tag: str, attribute: str, value: str | None = None) -> list[str]:
        return [str(attrs[attribute]) for name, attrs in self.elements if name == tag and attribute in attrs and value in (None, attrs[attribute])]

    def images(self) -> list[PIL.Image.Image]:
        sources = self.named("img", "src")
        assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
        return [PIL.Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1], validate=True))) for source in sources]


def scores_on(page: str) -> list[str]:
    return re.findall(r'class="score">([^<]*)<', page)


def test_page_is_well_formed_and_needs_nothing_else(tmp_path: Path) -> None:
    text = page_of(tmp_path, [entry_of(0.5), entry_of(2.5, label="defective")])
    assert text.startswith("<!DOCTYPE html>\n")
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert {"html", "head", "title", "style", "table", "figure", "figcaption", "img"} <= tags
    assert not tags & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?:|url\(|@import|\son\w+=", text)
    assert page.named("meta", "name", "viewport") == ["viewport"]
    assert page.named("img", "loading") == ["lazy"] * 4
    assert [image.size for image in page.images()] == [(12, 8)] * 4


def test_page_without_images_is_well_formed(tmp_path: Path) -> None:
    assert ("p", "No images.") in Page(page_of(tmp_path, [])).texts


def test_everything_is_escaped(tmp_path: Path) -> None:
    text = page_of(tmp_path, [entry_of(0.5, NASTY, label=NASTY)], title=NASTY, summary={NASTY: NASTY})
    page = Page(text)
    assert "<script" not in text
    shown = NASTY.replace("\n", "\\n").replace("\u202e", "\\u202e").replace("\udcff", "\\udcff")
    for tag in ("title", "h1", "th", "td"):
        assert (tag, shown) in page.texts
    assert ("span", shown) in page.texts
    assert ("span", f"labelled {shown}") in page.texts
    assert page.named("img", "alt") == [shown, f"heat map of {shown}"]


def test_braces_are_no_placeholders(tmp_path: Path) -> None:
    assert ("h1", "{rows} {0}") in Page(page_of(tmp_path, [entry_of(0.5, "{cards}")], title="{rows} {0}")).texts


def test_highest_score_comes_first_and_equal_ones_keep_their_order(tmp_path: Path) -> None:
    text = page_of(tmp_path, [entry_of(0.5, "a"), entry_of(2.0, "b"), entry_of(0.5, "c"), entry_of(3.0, "d"), entry_of(-1.0, "e")])
    assert scores_on(text) == ["3", "2", "0.5", "0.5", "-1"]
    assert re.findall(r'class="path">([^<]*)<', text) == ["d", "b", "a", "c", "e"]
    assert re.findall(r'class="verdict">([^<]*)<', text) == ["anomalous", "anomalous", "good", "good", "good"]


def test_label_is_shown_where_there_is_one(tmp_path: Path) -> None:
    text = page_of(tmp_path, [entry_of(2.0, label="defective"), entry_of(0.5)])
    assert re.findall(r"labelled ([^<]*)<", text) == ["defective"]


def test_all_heat_maps_share_one_scale(tmp_path: Path) -> None:
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
        (1.0, None, ["0.5", "threshold 1", "1.5 and above"]),
        (1.0, (0.5, 1.75), ["0.5", "threshold 1", "1.75 and above"]),
        (1.0, (0.9, 9.0), ["0.9", "9 and above"]),
        (5.0, (0.0, 1.0), ["0", "1 and above"]),
        (-1.0, None, ["0", "1 and above"]),
    ],
)
def test_legend_tells_the_scale(tmp_path: Path, threshold: float, colors: tuple[float, float] | None, marks: list[str]) -> None:
    entry = entry_of(0.5, value=0.97)
    text = page_of(tmp_path, [entry], threshold=threshold, color_range=colors)
    assert re.findall(r"<span style=[^>]*>([^<]*)<", text) == marks
    low, high = default_color_range(threshold) if colors is None else colors
    heat_map = np.asarray(Page(text).images()[1], dtype=int)
    assert np.abs(heat_map - np.asarray(heat_map_image(entry.image, entry.heat_map, low, high), dtype=int)).max() <= 4


def test_large_images_become_thumbnails_with_their_shape(tmp_path: Path) -> None:
    entry = ReportEntry("wide.png", 1.0, False, PIL.Image.new("RGB", (1600, 400)), torch.zeros(400, 1600))
    assert [image.size for image in Page(page_of(tmp_path, [entry])).images()] == [(256, 64)] * 2


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK", "F", "I", "I;16"])
def test_every_mode_of_image_is_shown(tmp_path: Path, mode: str) -> None:
    image = PIL.Image.new(mode, (12, 8))
    entry = ReportEntry("image.png", 1.0, False, image, torch.zeros(8, 12))
    assert [shown.size for shown in Page(page_of(tmp_path, [entry])).images()] == [(12, 8)] * 2


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


def test_bad_entry_leaves_the_old_page(tmp_path: Path) -> None:
    before = page_of(tmp_path, [entry_of(0.5)])
    with pytest.raises(ValueError, match=r"expected the score of 'x\.png' to be a finite number, got nan"):
        page_of(tmp_path, [entry_of(float("nan"), "x.png")])
    with pytest.raises(ValueError, match="expected threshold to be a finite number, got inf"):
        page_of(tmp_path, [entry_of(0.5)], threshold=float("inf"))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


def test_heat_map_colours_follow_the_distance() -> None:
    image = PIL.Image.new("L", (256, 2), 100)
    distances = torch.linspace(10, 20, 256).expand(2, 256)
    pixels = np.asarray(heat_map_image(image, distances, 10.0, 20.0), dtype=float)  # [2, 256, 3]
    assert pixels[0, 0].tolist() == [100, 100, 100]
    assert pixels[0, 255].tolist() == pytest.approx([0.2 * 100 + 0.8 * value for value in (252, 255, 164)], abs=0.5)
    luminance = pixels[0, 128:] @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) > -0.5).all()  # from the middle on brighter means farther; half a step for the rounding
    redness = pixels[0, :192, 0] - pixels[0, :192, 2]
    assert (np.diff(redness[64:]) > -1.5).all()
    assert redness[191] > 150
    outside = np.asarray(heat_map_image(image, torch.tensor([[-5.0], [99.0]]).expand(2, 256), 10.0, 20.0), dtype=float)
    assert outside[0, 0].tolist() == pixels[0, 0].tolist()
    assert outside[1, 0].tolist() == pixels[0, 255].tolist()


def test_heat_map_keeps_the_image_visible() -> None:
    image = PIL.Image.fromarray(np.array([[0, 255]], dtype=np.uint8))
    for distance, contrast in ((0.0, 255), (0.25, 204), (0.5, 51), (1.0, 51)):
        dark, bright = np.asarray(heat_map_image(image, torch.full((1, 2), distance), 0.0, 1.0), dtype=int)[0]
        assert bright - dark == pytest.approx([contrast] * 3, abs=1)


def test_colors_run_around_the_threshold() -> None:
    assert default_color_range(3.0) == (1.5, 4.5)
    for useless in (0.0, -1.0, float("inf"), float("nan")):
        assert default_color_range(useless) == (0.0, 1.0)


def test_heat_map_stretches_images_of_many_bits() -> None:
    # A sensor's 12 bits in a 16-bit file would be black otherwise.
    values = np.array([[0.010, 0.035, 0.060]], dtype=np.float32)
    stretched = heat_map_image(PIL.Image.fromarray(values), torch.zeros(1, 3), 0.0, 1.0)
    plain = heat_map_image(PIL.Image.fromarray(np.array([[0, 128, 255]], dtype=np.uint8)), torch.zeros(1, 3), 0.0, 1.0)
    assert np.array_equal(np.asarray(stretched), np.asarray(plain))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_heat_map_takes_any_float_dtype(dtype: torch.dtype) -> None:
    image = PIL.Image.new("L", (4, 3))
    values = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    expected = heat_map_image(image, values, 0.0, 11.0)
    assert np.array_equal(np.asarray(heat_map_image(image, values.to(dtype).requires_grad_(), 0.0, 11.0)), np.asarray(expected))


@pytest.mark.parametrize(
    ("anomaly_map", "low", "high", "message"),
    [
        (torch.zeros(4, 3), 0.0, 1.0, r"image's size \[3, 4\], got \[4, 3\]"),
        (torch.zeros(1, 3, 4), 0.0, 1.0, r"image's size \[3, 4\], got \[1, 3, 4\]"),
        (torch.zeros(3, 4), 1.0, 1.0, r"low to be below high, both finite, got 1\.0 and 1\.0"),
        (torch.zeros(3, 4), 0.0, float("inf"), "low to be below high, both finite"),
        (torch.zeros(3, 4), float("nan"), 1.0, "low to be below high, both finite"),
        (torch.full((3, 4), float("nan")), 0.0, 1.0, "anomaly_map to be finite"),
    ],
)
def test_heat_map_refuses_what_it_cannot_show(anomaly_map: torch.Tensor, low: float, high: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        heat_map_image(PIL.Image.new("L", (4, 3)), anomaly_map, low, high)


def test_covering_curve_is_drawn_when_there_is_one(tmp_path: Path) -> None:
    text = page_of(tmp_path, [entry_of(1.0)], covering_curve=[(1, 8.0), (10, 4.0), (100, 1.0)])
    points = re.search(r'<polyline points="([^"]*)"', text)
    assert points is not None
    places = [tuple(map(float, point.split(","))) for point in points.group(1).split()]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert places[1][0] - places[0][0] == pytest.approx(places[2][0] - places[1][0], abs=0.2)  # a logarithmic axis
    assert [y for _, y in places] == sorted(y for _, y in places)  # downwards on the page
    assert "100: 1<" in text
    for nothing in ([], [(5, 1.0)]):
        assert "<polyline" not in page_of(tmp_path, [entry_of(1.0)], covering_curve=nothing)
