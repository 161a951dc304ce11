"""Takes the documentation's pictures: `python scripts/screenshots.py http://127.0.0.1:8001/ report.html`.

The first is where `jaxdet arena` listens, the second what `jaxdet verify --html` wrote. Needs Debian's chromium.
"""

import re
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright

IMAGES = Path(__file__).parents[1] / "docs" / "images"
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
COLOURS = 64
"""Enough for pages without photographs, and a quarter of the bytes."""


def save(of: Page | Locator, name: str, **options) -> None:
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        of.screenshot(path=file.name, **options)
        picture = Image.open(file.name).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    IMAGES.mkdir(exist_ok=True)
    picture.save(IMAGES / f"{name}.png", optimize=True)


def main(url: str, report: str) -> None:
    with sync_playwright() as playwright, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path="/usr/bin/chromium",
            headless=True,
            args=FLAGS.split(),
            viewport={"width": 1100, "height": 900},
        )
        (page,) = context.pages
        page.goto(url)
        page.get_by_role("button", name="Run").click()
        status = page.locator("#status")
        expect(status).to_have_text(re.compile("^Done"), timeout=3_600_000)
        print(status.inner_text(), page.url, sep="\n")
        page.mouse.move(0, 0)
        notes = page.locator(".notes").bounding_box()
        assert notes is not None
        save(page, "arena", full_page=True, clip={"x": 0, "y": 0, "width": 1100, "height": notes["y"]})
        page.set_viewport_size({"width": 360, "height": 780})
        page.emulate_media(color_scheme="dark")
        page.locator("#plain").scroll_into_view_if_needed()
        page.locator("#plain").evaluate("e => e.scrollIntoView()")
        save(page, "arena-phone")
        page.emulate_media(color_scheme="light")
        page.set_viewport_size({"width": 1000, "height": 900})
        page.goto(Path(report).absolute().as_uri())
        save(page, "verify", full_page=True)
        context.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
