"""What an HTTP process and the engine's tell each other, over a socket that nobody else has.

Pickled, after its length in eight bytes: both ends are this program, started by itself.
"""

import pickle
import socket
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxdet.api.reader import Grammar
from jaxdet.engine.sequence import Entry
from jaxdet.engine.stats import EngineStats
from jaxdet.sampling_params import SamplingParams

LENGTH = struct.Struct("<Q")


class Open(NamedTuple):
    """Runs prompts. Their sequences are known by numbers from `first` on: the first prompt's, then the second's, ..."""

    first: int
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    grammar: Grammar | None = None
    score: bool = False
    """Only the prompts' logprobs are wanted."""

    @property
    def size(self) -> int:
        """Sequences that it runs."""
        return len(self.prompts) * self.params.n


class Close(NamedTuple):
    """Ends sequences."""

    numbers: Sequence[int]
    reason: str


class Ask(NamedTuple):
    """Wants the engine's statistics."""


class Opened(NamedTuple):
    """All prompts of an `Open` run."""

    first: int


class Refused(NamedTuple):
    """None of them does."""

    first: int
    error: Exception


class Full(NamedTuple):
    """None of them does: there is no room."""

    first: int
    taken: int
    """Sequences that run or wait, of all HTTP processes."""


class Failed(NamedTuple):
    """The engine gave these sequences up."""

    numbers: Sequence[int]


class Told(NamedTuple):
    """What the engine has done."""

    stats: EngineStats
    taken: int
    """As in `Full`."""


class State(NamedTuple):
    """How things stand, for all HTTP processes alike; comes when it has changed."""

    healthy: bool = True
    """The last step didn't fail for good."""
    full: bool = False
    """No other sequence would be taken."""


class Growth(NamedTuple):
    """What came with a sequence's new tokens, if anything did."""

    finish_reason: str | None
    stop_reason: int | None
    cached: int
    logprobs: list[Entry]
    """Of the new tokens, if they were asked for."""
    scores: list[float]
    """Of all the prompt's tokens from the second on, if they are wanted."""


class Grown(NamedTuple):
    """What sequences have got since the last word of them."""

    sequences: list[tuple[int, list[int], tuple | None]]
    """Number, tokens, and a Growth as a plain tuple: pickling those takes a third of the time."""


def pack(message: Any) -> bytes:
    """The message as it goes over the socket."""
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(body)) + body


unpack = pickle.loads
"""The message of a body."""


def receive(connection: socket.socket) -> Any:
    """The next message, waited for; None if there is none any more."""
    head = connection.recv(LENGTH.size, socket.MSG_WAITALL)
    if len(head) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(head)
    body = bytearray()
    while len(body) < size:
        if not (part := connection.recv(size - len(body), socket.MSG_WAITALL)):
            return None
        body += part
    return unpack(body)
