"""The arena's page in a real browser: runs, links, keyboard, phone, screen readers."""

import contextlib
import itertools
import re
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import uvicorn
from browser import browsing, low_contrasts
from playwright.sync_api import Page, Playwright, expect, sync_playwright
from serving import KEY
from serving import serving as serve
from test_arena import WIDE, answers_of

from jaxdet.arena.app import create_app
from jaxdet.arena.run import Arena
from jaxdet.arena.settings import Settings
from jaxdet.arena.tree import divergence_tree
from jaxdet.llm import LLM
from jaxdet.testing import byte_tokenizer, write_tiny_model

pytestmark = pytest.mark.slow
SETTINGS = {
    "prompt": "Hello",
    "completions": "4",
    "max_tokens": "4",
    "load": "4",
    "temperature": "0",
    "seed": "0",
}
DONE = re.compile("^Done")
EVIL = '<img src="x" onerror="document.title = 1">'


@contextlib.contextmanager
def serving(arena) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(create_app(arena, host="127.0.0.1"), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    arena = Arena(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", **WIDE))
    with serving(arena) as url:
        yield url


@pytest.fixture
def page(playwright) -> Iterator[Page]:
    """A page of a new browser, in which no script may fail and nothing be refused."""
    with browsing(playwright, viewport={"width": 1100, "height": 900}) as context:
        (page,) = context.pages
        page.set_default_timeout(60_000)
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield page
        assert [c for c in complaints if not re.search("status of 40[01]", c)] == []


def run(page: Page, **changes: str) -> None:
    for name, value in (SETTINGS | changes).items():
        page.locator(f"#{name}").fill(value)
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#status")).to_have_text(DONE, timeout=120_000)


def counts(page: Page, column: str) -> tuple[int, int]:
    """Different texts and different bits."""
    texts, bits = page.locator(f"#{column} .counts dd").all_inner_texts()
    return int(texts), int(bits)


def test_a_run(page, url):
    page.goto(url)
    expect(page.locator("#facts")).to_contain_text("fp_")
    run(page)
    assert counts(page, "jaxdet") == (1, 1)
    texts, bits = counts(page, "plain")
    assert texts >= 1 and bits > 1  # the control
    for column, letters in (("jaxdet", {"A"}), ("plain", {"A", "B"})):
        cells = page.locator(f"#{column} .strip[data-of=bits] span")
        assert cells.count() == 4 and letters <= set(cells.all_inner_texts())
    expect(page.locator("#status")).to_contain_text("jaxdet: 1 text, 1 set of bits")
    page.locator("#jaxdet summary").first.click()
    rows = page.locator("#jaxdet details tbody tr")
    assert rows.count() == 4
    for row in rows.all():
        _, value, seen = row.locator("td").all_inner_texts()
        decimal, in_hex = value.split()
        assert np.float32(float.fromhex(in_hex)) == np.float32(decimal) and seen.strip() == "4"


def test_a_link_replays_to_the_same_bits(page, url, playwright):
    page.goto(url)
    run(page, temperature="1", seed="3")
    digest = page.locator("#jaxdet .digest").inner_text()
    link = page.locator("#link").input_value()
    assert digest in link and link == page.url
    with browsing(playwright) as other:
        again = other.pages[0]
        again.goto(link)
        expect(again.locator("#status")).to_contain_text("Run it to compare")
        assert again.locator("#seed").input_value() == "3"
        verdict = again.locator("#verdict")
        for load in ("4", "2"):  # no bit of jaxdet's depends on the load
            again.locator("#load").fill(load)
            again.get_by_role("button", name="Run").click()
            expect(verdict).to_contain_text("✓ jaxdet gave the same bits as the link", timeout=60_000)
            expect(again.locator("#status")).to_have_text(DONE)
            assert again.locator("#jaxdet .digest").inner_text() == digest
        # The controls: a link that says something else is told apart, and another request is not compared with it.
        again.goto(link.replace(digest, "0" * 64))
        again.get_by_role("button", name="Run").click()
        expect(verdict).to_contain_text("✗ jaxdet gave other bits than the link", timeout=60_000)
        expect(verdict).to_contain_text("please report it")
        expect(again.locator("#status")).to_have_text(DONE)
        again.goto("about:blank")
        again.goto(link.replace(digest, "0" * 64).replace("fp_", "fp_other"))
        again.get_by_role("button", name="Run").click()
        expect(verdict).to_contain_text("other weights", timeout=60_000)
        expect(again.locator("#status")).to_have_text(DONE)
        again.locator("#seed").fill("4")
        again.get_by_role("button", name="Run").click()
        expect(again.locator("#status")).to_have_text(re.compile("^Running"))
        expect(again.locator("#status")).to_have_text(DONE, timeout=60_000)
        expect(verdict).to_be_hidden()


def test_keyboard(page, url):
    page.goto(url)
    order = []
    for _ in range(8):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert order == ["skip", "prompt", "load", "completions", "max_tokens", "temperature", "seed", "go"]
    for name in ("seed", "temperature", "max_tokens", "completions"):
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Control+a")
        page.keyboard.type(SETTINGS[name])
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#load-says")).to_have_text("1 to 2 requests share a batch")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Control+a")
    page.keyboard.type("Hello")
    for _ in range(6):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text(DONE, timeout=120_000)
    assert page.evaluate("document.activeElement.id") == "go"  # the focus stays where it was
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    page.keyboard.press("Enter")
    expect(page.locator("#plain details table")).to_be_visible()


class Scripted:
    """An arena whose answers part, and say what would be HTML."""

    def __init__(self):
        self.facts = {
            "model": EVIL,
            "dtype": "",
            "backend": "",
            "numerics_version": 1,
            "fingerprint": "fp_1",
        }

    def run(self, settings: Settings):
        tokens = list(EVIL.encode())
        answers = answers_of((tokens, 0.1), ([*tokens[:9], 65, 10], 0.2), ([*tokens[:9], 66], 0.3))
        tree = divergence_tree(answers, byte_tokenizer())
        yield {"event": "start", "batches": [{"size": 3, "ours": 3}]}
        for column in ("plain", "jaxdet"):
            yield {"event": "progress", "column": column, "batch": 0, "size": 3, "step": 1}
            count = {"outputs": [0, 1, 2], "bits": [0, 1, 2], "sizes": [1, 2, 3]}
            count |= {"diverges_at": 10, "bits_differ_at": 1}
            yield {"event": "answers", "column": column} | count
            yield {"event": "column", "column": column, "digest": "d" * 64, "tree": tree}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tree_phone_and_screen_reader(playwright, scheme):
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with (
        serving(Scripted()) as url,
        browsing(playwright, color_scheme=scheme, reduced_motion="reduce", **phone) as context,
    ):
        (page,) = context.pages
        page.goto(url)
        run(page, completions="3")
        tree = page.locator("#plain .tree")
        assert tree.locator("> ul > li").count() == 3
        assert tree.locator("> p").inner_text() == EVIL[:9]
        expect(tree).to_contain_text(EVIL[9:])
        assert page.locator("main img").count() == 0 and page.title() == "jaxdet arena"
        expect(page.locator("#facts")).to_contain_text(EVIL)
        expect(tree.locator("tr.chosen").first).to_contain_text("← chosen")
        for summary in page.locator("summary").all():
            summary.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert low_contrasts(page) == []
        page.locator("#status").evaluate("e => { e.style.color = '#777' }")
        assert [what.split()[1] for what in low_contrasts(page)] == ["P"]  # the control
        assert (
            page.evaluate("getComputedStyle(document.querySelector('.strip span')).transitionDuration")
            == "0s"
        )
        # What a screen reader is told.
        for role in ("textbox", "slider", "spinbutton", "button", "region", "img", "progressbar", "form"):
            found = page.get_by_role(role)
            assert found.count() > 0, role
            assert page.get_by_role(role, name=re.compile(".")).count() == found.count(), (
                f"a {role} has no name"
            )
        levels = page.get_by_role("heading").evaluate_all("all => all.map((h) => Number(h.tagName[1]))")
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
        assert page.locator("#status").get_attribute("role") == "status"
        assert page.locator("html").get_attribute("lang") == "en"
        ids = page.locator("[id]").evaluate_all("all => all.map((e) => e.id)")
        assert len(ids) == len(set(ids)) > 10
        small = page.locator("button, input, textarea, summary").evaluate_all(
            "all => all.filter((e) => e.checkVisibility() && e.getBoundingClientRect().height < 24).map((e) => e.id)"
        )
        assert small == []


@pytest.fixture(scope="module")
def serve_url(tmp_path_factory) -> Iterator[str]:
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    llm = LLM(folder, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256)
    with serve(llm) as server:
        yield f"{server.url}/"


def test_the_servers_own_page(page, serve_url):
    page.goto(serve_url)
    expect(page.locator("#status")).to_contain_text("API key")
    page.locator("#key").fill(KEY)
    page.keyboard.press("Tab")
    expect(page.locator("#facts")).to_contain_text("tiny · fp_")
    expect(page.locator("#plain")).to_be_hidden()
    digests = set()
    for load, seed in (("1", "1"), ("8", "1"), ("8", "2")):
        run(page, temperature="1", load=load, seed=seed, completions="7")
        assert counts(page, "jaxdet") == (1, 1)
        digests.add(page.locator("#jaxdet .digest").inner_text())
        expect(page.locator("#verdict")).to_be_visible(visible=(load, seed) == ("8", "1"))
    assert len(digests) == 2 and {len(digest) for digest in digests} == {64}
    expect(page.locator("#jaxdet .tree")).not_to_be_empty()
    page.locator("#jaxdet summary").first.click()
    for row in page.locator("#jaxdet details tbody tr").all():
        decimal, in_hex = row.locator("td").nth(1).inner_text().split()
        assert np.float32(float.fromhex(in_hex)) == np.float32(decimal)


def test_the_servers_page_tells_answers_apart(page, serve_url):
    """The control: what a server without the promise would send."""
    page.route("**/v1/completions", in_other_words)
    page.goto(serve_url)
    page.locator("#key").fill(KEY)
    run(page, completions="3", load="1")
    assert counts(page, "jaxdet") == (3, 3)
    assert page.locator("#jaxdet .tree > ul > li").count() == 2
    expect(page.locator("#jaxdet .tree > p")).to_have_text("A")
    expect(page.locator("#jaxdet .tree")).to_contain_text("-0x1.00002p-1")


def in_other_words(route) -> None:
    """A, then B and C, then B and its end, then D, one a request."""
    answers = (["A", "B", "C"], ["A", "B"], ["A", "D", "C"])
    tokens = answers[len(SEEN) % 3]
    SEEN.append(tokens)
    logprobs = [-0.5 - 2**-20] * len(tokens)
    tops = [{token: value} for token, value in zip(tokens, logprobs, strict=True)]
    logprobs = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops}
    route.fulfill(json={"choices": [{"logprobs": logprobs}]})


SEEN: list[list[str]] = []


def test_stopping_and_what_goes_wrong(page, url):
    page.goto(url)
    for name, value in (SETTINGS | {"completions": "64", "max_tokens": "128"}).items():
        page.locator(f"#{name}").fill(value)
    go, status = page.locator("#go"), page.locator("#status")
    go.click()
    expect(page.locator("#plain .where")).to_contain_text("batch", timeout=60_000)
    expect(go).to_have_text("Stop")
    go.click()
    expect(status).to_have_text("Stopped.")
    expect(go).to_have_text("Run")
    page.locator("#prompt").fill("x" * 384)
    go.click()
    expect(status).to_contain_text("tokens and at most 256 fit", timeout=60_000)
    expect(status).to_have_class("bad")
    run(page)
    assert counts(page, "jaxdet") == (1, 1)
