"""Pages of the KV cache: who owns them, and which prefixes they hold."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence as Tokens

import numpy as np

from pallas_kernels.numerics import NUMERICS_VERSION, PAGE_SIZE, TRASH_PAGE


class PagePool:
    """Hands out pages and remembers full ones by the hash of the prefix they end.

    A page's content is a function of its prefix alone, so sharing it changes no bit. Pages that nobody holds stay
    findable until they are needed; the least recently freed goes first.

    Args:
        num_pages: pages of the pool, the trash page included.
        salt: what else the content depends on (weights, dtype); hashed into every prefix.
        caching: whether to remember prefixes.
    """

    def __init__(self, num_pages: int, salt: str, caching: bool):
        self.caching = caching
        self.root = hashlib.sha256(f"{NUMERICS_VERSION}/{salt}".encode()).digest()
        self._free: OrderedDict[int, None] = OrderedDict((p, None) for p in range(TRASH_PAGE + 1, num_pages))
        self._users = np.zeros(num_pages, np.int32)
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that could be allocated now."""
        return len(self._free)

    def extend_hash(self, previous: bytes, tokens: Tokens[int]) -> bytes:
        """Hash of a prefix that ends with the full page `tokens`."""
        return hashlib.sha256(previous + np.asarray(tokens, np.int32).tobytes()).digest()

    def match(self, tokens: Tokens[int]) -> tuple[list[int], list[bytes]]:
        """Takes the cached pages of the longest known prefix, at least one token short of the whole."""
        pages: list[int] = []
        hashes: list[bytes] = []
        if not self.caching:
            return pages, hashes
        previous = self.root
        for start in range(0, len(tokens) - PAGE_SIZE, PAGE_SIZE):
            previous = self.extend_hash(previous, tokens[start : start + PAGE_SIZE])
            if (page := self._page_of.get(previous)) is None:
                break
            self._free.pop(page, None)
            self._users[page] += 1
            pages.append(page)
            hashes.append(previous)
        return pages, hashes

    def allocate(self) -> int:
        """A page of one's own; its old content is forgotten."""
        page, _ = self._free.popitem(last=False)
        self._forget(page)
        self._users[page] = 1
        return page

    def remember(self, page: int, prefix: bytes) -> None:
        """Makes a full page findable."""
        if self.caching and prefix not in self._page_of:
            self._page_of[prefix], self._hash_of[page] = page, prefix

    def release(self, pages: Tokens[int], *, poisoned: bool = False) -> None:
        """Gives pages back, last first, so that long prefixes are evicted from their ends."""
        for page in reversed(pages):
            if poisoned:
                self._forget(page)
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free[page] = None

    def forget_all(self) -> None:
        """No prefix is known any more."""
        self._page_of.clear()
        self._hash_of.clear()

    def _forget(self, page: int) -> None:
        if (prefix := self._hash_of.pop(page, None)) is not None:
            del self._page_of[prefix]
