"""What the report does in a browser: slider, filters, keyboard. Needs Chromium or Chrome on PATH."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest
import torch
from sklearn.datasets import load_sample_image

from patchcore_ext._pictures import encoded
from patchcore_ext.report import Report, ReportEntry, heat_map_image

pytest.importorskip("websocket", reason="websocket-client is not installed: the report's tests in a browser did not run")

from browser import Browser, find_browser

# (score, kind of defect, is it defective), the highest score first; the threshold is 1.
IMAGES = (
    (2.0, "crack", True),
    (1.8, "burr", True),
    (1.6, None, False),
    (1.4, "crack", True),
    (0.9, "a </script>\" 'b", True),
    (0.7, None, False),
    (0.5, "crack", True),
    (0.3, None, False),
)
HIDDEN = ((0.2, None, False), (0.1, "crack", True))  # counted, and not shown


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = find_browser()
    if executable is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH: the report's tests in a browser did not run")
    with Browser(executable) as opened:
        yield opened


def write_page(path: Path, images: tuple[tuple[float, str | None, bool | None], ...], limit: int = 1000) -> Path:
    report = Report(1.0, limit=limit)
    for index, (score, defect, truth) in enumerate(images):
        grey = PIL.Image.new("L", (32, 32), 100)
        report.add(ReportEntry(f"{index}.png", score, score > 1, grey, torch.full((32, 32), score), defect, truth))
    report.write(path, title="Browser")
    return path


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Browser:
    """The page of IMAGES, freshly opened."""
    browser.resize(1280, 900)
    browser.open(write_page(tmp_path / "report.html", IMAGES + HIDDEN, limit=len(IMAGES)))
    return browser


def set_threshold(page: Browser, value: float) -> None:
    page.run(f"(() => {{ const slider = document.getElementById('threshold'); slider.value = {value}; slider.dispatchEvent(new Event('input')); }})()")


def counts(page: Browser) -> list[str]:
    found: list[str] = page.run("[...document.querySelectorAll('#counts li')].map((item) => item.textContent)")
    return found


def shown(page: Browser) -> list[str]:
    found: list[str] = page.run(
        "[...document.querySelectorAll('.card')].filter((card) => card.offsetParent).map((card) => card.querySelector('.name').textContent)"
    )
    return found


def verdicts(page: Browser) -> list[str]:
    found: list[str] = page.run("[...document.querySelectorAll('.verdict')].map((verdict) => verdict.textContent)")
    return found


def choose(page: Browser, *labels: str) -> None:
    for label in labels:
        page.run(f"[...document.querySelectorAll('#filters label')].find((label) => label.textContent === {label!r}).click()")


def focused(page: Browser) -> str | None:
    name: str | None = page.run("document.activeElement.closest('.card')?.querySelector('.name').textContent")
    return name


def test_first_counts_are_those_of_all_images(page: Browser) -> None:
    assert counts(page) == ["3 of 6 missed", "1 of 4 false alarms"]
    assert page.run("document.getElementById('threshold-value').textContent") == "1"
    assert verdicts(page) == ["anomalous", "anomalous", "false alarm", "anomalous", "missed", "good", "missed", "good"]
    assert page.run("document.getElementById('shown').textContent") == "8 of 8 shown"


def test_slider_moves_counts_line_point_and_verdicts(page: Browser) -> None:
    line = "document.getElementById('line').getBoundingClientRect().left"
    before = page.run(line)
    set_threshold(page, 1.7)
    assert counts(page) == ["4 of 6 missed", "0 of 4 false alarms"]
    assert verdicts(page)[:4] == ["anomalous", "anomalous", "good", "missed"]
    assert page.run(line) > before + 50
    point = [float(page.run(f"document.getElementById('roc-point').getAttribute('{axis}')")) for axis in ("cx", "cy")]
    assert point == pytest.approx([0, 100 - 100 * 2 / 6])
    set_threshold(page, 0.15)
    assert counts(page) == ["1 of 6 missed", "4 of 4 false alarms"]
    page.run("document.getElementById('reset').click()")
    assert counts(page) == ["3 of 6 missed", "1 of 4 false alarms"]
    assert page.run(line) == pytest.approx(before)


def test_a_score_at_the_threshold_is_not_anomalous(page: Browser) -> None:
    page.run("document.getElementById('threshold').step = 'any'")
    set_threshold(page, 1.6)
    assert counts(page)[1] == "0 of 4 false alarms"
    set_threshold(page, 1.5999999999999999)
    assert counts(page)[1] == "0 of 4 false alarms"
    set_threshold(page, 1.5999999999999)
    assert counts(page)[1] == "1 of 4 false alarms"


def test_slider_answers_to_the_keyboard(page: Browser) -> None:
    page.run("document.getElementById('threshold').focus()")
    for _ in range(40):
        page.press("ArrowRight")
    assert float(page.run("document.getElementById('threshold').value")) > 1.3
    assert counts(page) != ["3 of 6 missed", "1 of 4 false alarms"]
    assert focused(page) is None


def test_filters_combine_and_follow_the_slider(page: Browser) -> None:
    choose(page, "missed")
    assert shown(page) == ["4.png", "6.png"]
    choose(page, "false alarm")
    assert shown(page) == ["2.png", "4.png", "6.png"]
    choose(page, "crack")
    assert shown(page) == ["6.png"]
    assert page.run("document.getElementById('shown').textContent") == "1 of 8 shown"
    set_threshold(page, 1.7)
    assert shown(page) == ["3.png", "6.png"]
    choose(page, "missed", "false alarm", "crack")
    assert len(shown(page)) == 8
    choose(page, "a </script>\" 'b")
    assert shown(page) == ["4.png"]
    choose(page, "burr", "correct")
    set_threshold(page, 1.9)
    assert shown(page) == []


def test_keys_move_over_the_shown_cards(page: Browser) -> None:
    page.press("j")
    assert focused(page) == "0.png"
    for key, name in (("j", "1"), ("ArrowRight", "2"), ("k", "1"), ("ArrowLeft", "0"), ("ArrowLeft", "0"), ("ArrowDown", "3"), ("ArrowUp", "0")):
        page.press(key)
        assert focused(page) == f"{name}.png", key
    choose(page, "missed")
    page.press("j")
    assert focused(page) == "4.png"
    page.press("j")
    assert focused(page) == "6.png"
    page.press("j")
    assert focused(page) == "6.png"
    assert page.run("document.activeElement.matches(':focus-visible')")
    assert page.run("document.querySelectorAll('.card button[tabindex=\"0\"]').length") == 1


def test_focused_card_is_not_below_the_panel(page: Browser) -> None:
    page.resize(375, 800)
    page.press("j")
    for _ in range(7):
        page.press("j")
    for _ in range(7):
        page.press("k")
        assert page.run("document.activeElement.getBoundingClientRect().top >= document.querySelector('.panel').getBoundingClientRect().bottom")


def test_large_view_opens_moves_and_closes(page: Browser) -> None:
    is_open = "document.getElementById('viewer').open"
    name = "document.getElementById('viewer-name').textContent"
    page.press("j")
    page.press("Enter")
    assert page.run(is_open)
    assert page.run(name) == "0.png"
    assert page.run("document.getElementById('viewer-facts').textContent") == "score 2 · threshold 1 · called anomalous · in truth crack"
    page.press("ArrowRight")
    page.press("j")
    assert page.run(name) == "2.png"
    assert page.run("document.getElementById('viewer-heat-map').src === document.querySelectorAll('.card')[2].querySelectorAll('img')[1].src")
    assert page.run("document.getElementById('viewer-heat-map').decode().then(() => true)")
    page.press("Escape")
    assert page.run(f"new Promise((done) => requestAnimationFrame(() => done({is_open})))") is False
    assert focused(page) == "2.png"


def test_labels_that_are_unknown_are_counted_as_flagged(browser: Browser, tmp_path: Path) -> None:
    browser.open(write_page(tmp_path / "report.html", tuple((score, None, None) for score, _, _ in IMAGES)))
    assert counts(browser) == ["4 of 8 anomalous"]
    choose(browser, "good")
    assert shown(browser) == [f"{index}.png" for index in range(4, 8)]
    set_threshold(browser, 0.6)
    assert counts(browser) == ["6 of 8 anomalous"]
    assert len(shown(browser)) == 2


def test_page_without_images_runs(browser: Browser, tmp_path: Path) -> None:
    browser.open(write_page(tmp_path / "report.html", ()))
    browser.press("j")
    set_threshold(browser, 1.2)
    assert browser.run("document.getElementById('threshold-value').textContent") == "1.2"


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_nothing_is_wider_than_the_window(page: Browser, width: int) -> None:
    page.resize(width, 800)
    assert page.run("document.documentElement.scrollWidth") <= width


def test_long_names_are_broken(browser: Browser, tmp_path: Path) -> None:
    report, long = Report(1.0), "w" * 300
    for path, truth in ((long, True), ("a.png", False)):
        report.add(ReportEntry(path, 2.0, True, PIL.Image.new("L", (32, 32)), torch.zeros(32, 32), long if truth else None, truth))
    report.write(tmp_path / "report.html", title=long, summary={long: long}, metrics={long: 1.0})
    browser.resize(375, 800)
    browser.open(tmp_path / "report.html")
    assert browser.run("document.documentElement.scrollWidth") <= 375
    browser.press("j")
    browser.press("Enter")
    assert browser.run("document.getElementById('viewer').scrollWidth") <= 375


def test_injected_script_does_not_run(browser: Browser, tmp_path: Path) -> None:
    path = write_page(tmp_path / "report.html", IMAGES)
    path.write_text(path.read_text(encoding="utf-8").replace("<h1>", "<h1><script>window.injected = true</script>"), encoding="utf-8")
    browser.open(path)
    assert counts(browser)
    assert browser.run("window.injected === undefined")


def test_a_thousand_images(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints how long a page of 1,000 photographs of 320 x 320 pixels takes until it is loaded and the slider has answered."""
    image = PIL.Image.fromarray(load_sample_image("china.jpg")).crop((160, 50, 480, 370))
    heat_map = torch.linspace(0, 2, 320).expand(320, 320)
    # Drawing and compressing 2,000 pictures takes longer than all else here: two will do.
    addresses = {1: encoded(heat_map_image(image, heat_map, 0.5, 1.5)), 0: encoded(image)}
    calls = itertools.count(1)
    monkeypatch.setattr("patchcore_ext.report.encoded", lambda _: addresses[next(calls) % 2 == 0])
    monkeypatch.setattr("patchcore_ext.report.heat_map_image", lambda image, *_: image)
    report = Report(1.0)
    for index in range(1000):
        report.add(ReportEntry(f"{index}.png", index / 500, index > 500, PIL.Image.new("L", (320, 320)), heat_map, is_defective=index % 3 == 0))
    report.write(tmp_path / "report.html", title="Thousand")
    browser.resize(1280, 900)
    started = time.perf_counter()
    browser.open(tmp_path / "report.html")
    loaded = time.perf_counter()
    set_threshold(browser, 1.5)
    frame = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
    assert browser.run(frame)
    answered = time.perf_counter()
    assert counts(browser) == ["251 of 334 missed", "166 of 666 false alarms"]
    assert len(shown(browser)) == 1000
    with capsys.disabled():
        size = (tmp_path / "report.html").stat().st_size / 1e6
        print(f"\n1,000 images, {size:.0f} MB: loaded after {loaded - started:.2f} s, slider answered {answered - loaded:.2f} s later")
