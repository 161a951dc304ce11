"""Pages of the KV cache: who owns them, and which prefixes they hold."""

import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Sequence as Tokens
from typing import NamedTuple

import numpy as np

from pallas_kernels.numerics import NUMERICS_VERSION, PAGE_SIZE, TRASH_PAGE


class Prefix(NamedTuple):
    """Hashes of everything but the last of `length` tokens, whose logits are always computed."""

    length: int
    pages: list[bytes]
    """Of each full page."""
    tail: bytes | None
    """Of the tokens in the page after them, if there are any."""

    @property
    def keys(self) -> list[bytes]:
        return [*self.pages, self.tail] if self.tail else self.pages


class PagePool:
    """Hands out pages and remembers what they hold by the hash of the prefix that ends in them.

    A page's content is a function of its prefix alone, so sharing it changes no bit. Full pages are shared; the page
    in which a prompt ends goes on growing, so who needs the same prompt copies it. Pages that nobody holds stay
    findable until they are needed; the least recently freed goes first.

    Args:
        num_pages: pages of the pool, the trash page included.
        salt: what else the content depends on (weights, dtype); hashed into every prefix.
        caching: whether to remember prefixes.
    """

    def __init__(self, num_pages: int, salt: str, caching: bool):
        self.caching, self.num_pages = caching, num_pages
        self.root = hashlib.sha256(f"{NUMERICS_VERSION}/{salt}".encode()).digest()
        self.clear()

    def clear(self) -> None:
        """All pages are free and hold nothing."""
        pages = range(TRASH_PAGE + 1, self.num_pages)
        self._free: OrderedDict[int, None] = OrderedDict((page, None) for page in pages)
        self._users = np.zeros(self.num_pages, np.int32)
        self._page_of: dict[bytes, int] = {}
        self._keys_of: dict[int, list[bytes]] = defaultdict(list)

    @property
    def available(self) -> int:
        """Pages that could be allocated now."""
        return len(self._free)

    def extend_hash(self, previous: bytes, tokens: Tokens[int]) -> bytes:
        """Hash of a prefix that ends with `tokens` in a page of their own."""
        return hashlib.sha256(previous + np.asarray(tokens, np.int32).tobytes()).digest()

    def prefix(self, tokens: Tokens[int]) -> Prefix:
        """Hashes of all of `tokens` but the last."""
        pages, previous, end = [], self.root, len(tokens) - 1
        for start in range(0, end - PAGE_SIZE + 1, PAGE_SIZE):
            previous = self.extend_hash(previous, tokens[start : start + PAGE_SIZE])
            pages.append(previous)
        rest = tokens[len(pages) * PAGE_SIZE : end]
        return Prefix(len(tokens), pages, self.extend_hash(previous, rest) if len(rest) else None)

    def match(self, prefix: Prefix) -> tuple[list[int], int | None]:
        """Takes the pages of the longest known part; with all of them also the page that begins with the tail."""
        pages: list[int] = []
        if not self.caching:
            return pages, None
        for key in prefix.pages:
            if (page := self._page_of.get(key)) is None:
                return pages, None
            self._take(page)
            pages.append(page)
        tail = self._page_of.get(prefix.tail) if prefix.tail else None
        if tail is not None:
            self._take(tail)
        return pages, tail

    def known(self, key: bytes) -> bool:
        return key in self._page_of

    def allocate(self) -> int:
        """A page of one's own; its old content is forgotten."""
        page, _ = self._free.popitem(last=False)
        self._forget(page)
        self._users[page] = 1
        return page

    def remember(self, page: int, prefix: bytes) -> None:
        """Makes a page findable."""
        if self.caching and prefix not in self._page_of:
            self._page_of[prefix] = page
            self._keys_of[page].append(prefix)

    def release(self, pages: Tokens[int], *, poisoned: bool = False) -> None:
        """Gives pages back, last first, so that long prefixes are evicted from their ends."""
        for page in reversed(pages):
            if poisoned:
                self._forget(page)
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free[page] = None

    def _take(self, page: int) -> None:
        self._free.pop(page, None)
        self._users[page] += 1

    def _forget(self, page: int) -> None:
        for key in self._keys_of.pop(page, ()):
            del self._page_of[key]
