"""A headless Chromium of Debian's, with nothing of its own on the disk or the network."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext, Page, Playwright

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def chromium() -> str:
    """Where it is; without it its tests can't run, which CI doesn't accept."""
    if (path := shutil.which("chromium")) is None:
        if os.environ.get("CI"):
            raise FileNotFoundError("chromium is not installed; apt-get install chromium")
        pytest.skip("chromium is not installed")
    return path


@contextlib.contextmanager
def browsing(playwright: Playwright, **options) -> Iterator[BrowserContext]:
    """A browser without any history."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=chromium(), headless=True, args=FLAGS, **options
        )
        try:
            yield context
        finally:
            context.close()


CONTRAST = """() => {
  const channel = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const parse = (s) => s.match(/[\\d.]+/g).map(Number);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.body.querySelectorAll("*")) {
    const says = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) || "value" in e;
    if (!says || !e.checkVisibility() || e.getBoundingClientRect().width <= 1) continue;
    const [a, b] = [parse(getComputedStyle(e).color), behind(e)].map(light).sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), `${e.tagName} ${e.className} ${e.textContent.slice(0, 20)}`]);
  }
  return found;
}"""
"""The contrast of every text that is seen with what is behind it, as WCAG counts it."""


def low_contrasts(page: Page) -> list[str]:
    """Texts below WCAG AA's 4.5."""
    found = page.evaluate(CONTRAST)
    assert len(found) > 10
    return [f"{ratio:.2f} {what}" for ratio, what in found if ratio < 4.5]
