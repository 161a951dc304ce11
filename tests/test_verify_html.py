"""The certificate as a page: what it says, that no name in it becomes HTML, and that it comes whole or not at all."""

import html.parser
import json
import re
import sys

import numpy as np
import pytest
from browser import browsing, low_contrasts
from playwright.sync_api import sync_playwright

from jaxdet.cli import main
from jaxdet.verify import Case, Report
from jaxdet.verify.html import render_html, write_html

EVIL = '<script>alert("1")</script>&'


def compared(promise: str, name: str, found, expected) -> Case:
    case = Case(promise, name)
    case.compare(np.float32(found), np.float32(expected))
    return case


def report_of(ours: Case, plain: Case, **facts: object) -> Report:
    return Report("tiny", "abc123", [ours], [plain], {"versions": {"jax": "0.11.2"}, "xla_flags": ""} | facts)


@pytest.fixture
def certified() -> Report:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(1000).astype(np.float32)
    moved = values.copy()
    moved[:5] = -moved[:5]
    moved[200:400] = np.nextafter(moved[200:400], np.float32(np.inf))
    name = "decode in batches"
    return report_of(compared("I1", name, values, values), compared("I1", name, moved, values))


class Page(html.parser.HTMLParser):
    """The tags of a page, its text, and the heat map's cells."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    @property
    def heat(self) -> list[str]:
        found = [attrs for tag, attrs in self.tags if tag == "td" and "title" in attrs]
        return [f"{attrs['class']} {attrs['title']}" for attrs in found]


def test_bits_are_counted_by_place():
    one = np.float32([1.0, 2.0, 3.0])
    case = compared("I1", "case", one, one)
    assert case.bits == [0] * 32  # the control
    bits = one.view(np.uint32) ^ np.uint32([1, 0x80000001, 0])
    case.compare(bits.view(np.float32), one)
    assert (case.compared, case.differing) == (6, 2)
    assert case.bits == [2] + [0] * 30 + [1]
    case.compare(np.array([1, 2]), np.array([1, 3]))  # token ids count, but have no bits of a float32
    assert (case.differing, sum(case.bits)) == (3, 3)


def test_certificate(certified):
    assert certified.ok and certified.control_bites
    page = Page(render_html(certified))
    assert "✓ certified: 1,000 values, 0 differ" in page.text
    assert "205 of 1,000" in page.text
    assert "abc123" in page.text and "jax 0.11.2" in page.text and "xla flags" not in page.text
    ours, plain = page.heat[:32], page.heat[32:]
    assert len(plain) == 32
    assert {cell.split()[0] for cell in ours} == {"s0"}
    assert plain[0] == "s4 bit 31: 5 values, 0.5 %"
    assert plain[31].startswith("s6 bit 0: 200 values")
    assert json.dumps(certified.control[0].bits).startswith("[200, ")


def test_failure(certified):
    certified.cases[0].differing = 3
    text = Page(render_html(certified)).text
    assert "✗ NOT deterministic: 1 of 1 cases failed" in text and "certified:" not in text


def test_a_control_without_a_bite_is_said(certified):
    certified.control[0].differing = 0
    assert "does not show what jaxdet prevents" in render_html(certified)
    certified.control = []
    assert Page(render_html(certified)).heat == []


def test_nothing_is_taken_for_html(certified):
    certified.model = certified.digest = EVIL
    certified.cases[0].name = certified.control[0].name = certified.cases[0].note = EVIL
    certified.environment = {EVIL: EVIL, "versions": {EVIL: EVIL}}
    text = render_html(certified)
    page = Page(text)
    assert page.text.count(EVIL) >= 8
    assert [tag for tag, _ in page.tags if tag == "script"] == [] and EVIL not in text


def test_the_page_needs_nothing_else(certified):
    page = Page(render_html(certified))
    loads = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "action", "style")]
    assert loads == ["data:,"]
    assert not re.search(r"url\(|@import|https?://", render_html(certified))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(certified, tmp_path, scheme):
    write_html(certified, tmp_path / "report.html")
    phone = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme}
    with sync_playwright() as playwright, browsing(playwright, **phone) as context:
        (page,) = context.pages
        page.goto((tmp_path / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert low_contrasts(page) == []
        heat = page.locator(".heat td[title]")
        assert heat.count() == 64 and heat.last.bounding_box()["width"] > 4


def test_it_comes_whole_or_not_at_all(certified, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_html(certified, path)
    before = path.read_text(encoding="utf-8")
    assert before == render_html(certified) and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr("pathlib.Path.write_bytes", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_html(certified, path)
    assert path.read_text(encoding="utf-8") == before


def test_the_command_writes_it(certified, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jaxdet.cli.proof.run_verify", lambda *_, **__: certified)

    def verify(*arguments: str) -> int:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["jaxdet", "verify", "tiny", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    assert verify("--html", "page.html") == 0
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == render_html(certified)
    assert "page.html" in capsys.readouterr().out
    for arguments in (("--html", "gone/page.html"), ("--html", "."), ("--hlo", "--html", "page.html")):
        assert verify(*arguments) == 1
        assert capsys.readouterr().err.startswith("jaxdet: html ") or "--hlo" in arguments
