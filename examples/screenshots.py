"""Draws the pictures of the report in docs/ from the demo's page; needs Chromium or Chrome on PATH. Run it with ``make screenshots``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "python_tests"))
from browser import NAMES, Browser, find_browser

LARGEST_BYTES = 400_000


def draw(browser: Browser, target: Path, *, width: int, height: int, scale: float, scroll_to: str | None = None) -> None:
    """Writes what a window of a size (in CSS pixels) shows as a PNG of at most 256 colours.

    Args:
        browser: with the page open.
        target: the PNG.
        width: of the window.
        height: of the window.
        scale: pixels of the picture for each of them.
        scroll_to: CSS selector of what comes to the top; None: the start of the page.
    """
    browser.resize(width, height, scale=scale)
    if scroll_to:
        browser.run(f"document.querySelector({scroll_to!r}).scrollIntoView()")
    # Pictures are decoded when they come into view.
    browser.run("Promise.all([...document.querySelectorAll('.card img')].slice(0, 24).map((image) => image.decode()))")
    browser.run("new Promise((done) => setTimeout(done, 300))")
    with tempfile.TemporaryDirectory() as folder:
        browser.screenshot(Path(folder) / "full.png")
        picture = Image.open(Path(folder) / "full.png").convert("RGB")
        picture.quantize(palette=picture.quantize(256), dither=Image.Dither.FLOYDSTEINBERG).save(target, optimize=True)
    if target.stat().st_size > LARGEST_BYTES:
        sys.exit(f"screenshots: {target} has {target.stat().st_size} bytes, more than {LARGEST_BYTES}; make it smaller")


def main() -> None:
    """Opens the page and draws report.png (desktop) and report-phone.png."""
    parser = argparse.ArgumentParser(description="Draws the pictures of the report in docs/.")
    parser.add_argument("page", type=Path, nargs="?", default=Path("demo/report.html"), help="the report (default: demo/report.html)")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of the pictures (default: docs)")
    arguments = parser.parse_args()
    executable = find_browser()
    if executable is None:
        sys.exit(f"screenshots: none of {', '.join(NAMES)} is on PATH")
    if not arguments.page.is_file():
        sys.exit(f"screenshots: {arguments.page} is missing; run: make demo")
    with Browser(executable) as browser:
        browser.open(arguments.page)
        draw(browser, arguments.output / "report.png", width=1280, height=900, scale=1)
        draw(browser, arguments.output / "report-phone.png", width=375, height=800, scale=1.5, scroll_to="#filters")


if __name__ == "__main__":
    main()
