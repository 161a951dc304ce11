"""The engine's side of the server: runs what the HTTP process asks for, and tells it what became of it."""

import contextlib
import dataclasses
import functools
import logging
import queue
import socket
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jaxdet.api.reader import Grammar
from jaxdet.engine.engine import Engine
from jaxdet.engine.sequence import Constraint, Sequence
from jaxdet.server.messages import (
    Ask,
    Close,
    Failed,
    Grown,
    Growth,
    Open,
    Opened,
    Refused,
    Told,
    pack,
    receive,
)

log = logging.getLogger("jaxdet.server")

MOST_FAILURES = 3
"""Steps that may fail in a row before the requests in them are given up."""


@dataclasses.dataclass(eq=False, slots=True)
class _Live:
    number: int
    told: int
    """How many of its tokens, the prompt's among them, the other side knows."""
    score: bool


class EngineHost:
    """Runs an engine for the other end of a connection. It never waits for it while there is work.

    Args:
        engine: nobody else may use it while this runs.
        start: makes a constraint of a grammar.
        connection: a stream socket; `messages` says what goes over it.
    """

    def __init__(self, engine: Engine, start: Callable[[Grammar], Constraint], connection: socket.socket):
        self._engine, self._start, self._connection = engine, start, connection
        self._inbox: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._live: dict[Sequence, _Live] = {}
        self._numbered: dict[int, Sequence] = {}
        self._compiling: dict[int, Open] = {}
        """What waits for its grammar, by its first number."""
        self._compilers = ThreadPoolExecutor(2, "grammar")
        self._behind: dict[Sequence, None] = {}
        """Sequences that the other side doesn't know the latest of."""
        self._outgoing = bytearray()
        """What the socket had no room for yet."""
        self._failures, self._healthy = 0, True

    def run(self) -> None:
        """Returns once the other side has closed the connection; what still runs is ended then."""
        reader = threading.Thread(target=self._read, name="reader", daemon=True)
        reader.start()
        try:
            while True:
                if not self._engine.has_work:
                    self._send_all()
                try:
                    act = self._inbox.get(block=not self._engine.has_work)
                except queue.Empty:
                    self._step()
                    continue
                if act is None:
                    return
                act()
        except OSError as error:  # the other side is gone
            log.debug("the connection broke: %s", error)
        finally:
            for sequence in list(self._live):
                self._engine.abort(sequence)
            self._compilers.shutdown(wait=False, cancel_futures=True)
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)  # which the reader hears, too
            reader.join()
            self._connection.close()

    def _read(self) -> None:
        """In a thread of its own: waits for messages."""
        acts = {
            Open: self._prepare,
            Close: self._close,
            Ask: lambda _: self._send(Told(self._engine.stats())),
        }
        try:
            while (message := receive(self._connection)) is not None:
                self._inbox.put(functools.partial(acts[type(message)], message))
        except OSError as error:
            log.debug("the connection broke: %s", error)
        finally:
            self._inbox.put(None)

    def _prepare(self, message: Open) -> None:
        """Compiles a grammar beside the engine, which some take longer than many steps."""
        if message.grammar is None:
            self._open(message, None)
            return
        self._compiling[message.first] = message
        self._compilers.submit(self._start, message.grammar).add_done_callback(
            lambda found: self._inbox.put(lambda: self._open_compiled(message, found))
        )

    def _open_compiled(self, message: Open, found: "Future[Constraint]") -> None:
        if self._compiling.pop(message.first, None) is None:  # closed in the meantime
            return
        try:
            constraint = found.result()
        except ValueError as error:
            self._send(Refused(message.first, error))
        else:
            self._open(message, constraint)

    def _open(self, message: Open, constraint: Constraint | None) -> None:
        opened: list[Sequence] = []
        try:
            for prompt in message.prompts:
                if message.score:
                    opened.append(self._engine.add_score(prompt))
                else:
                    opened += self._engine.add(prompt, message.params, constraint=constraint)
        except Exception as error:
            for sequence in opened:
                self._engine.abort(sequence)
            if not isinstance(error, ValueError):
                log.exception("a request could not be queued")
                error = RuntimeError(f"{type(error).__name__}: {error}")
            self._send(Refused(message.first, error))
            return
        for number, sequence in enumerate(opened, message.first):
            self._live[sequence] = _Live(number, len(sequence.prompt), message.score)
            self._numbered[number] = sequence
        self._send(Opened(message.first))

    def _close(self, message: Close) -> None:
        for number in message.numbers:
            self._compiling.pop(number, None)  # a request is closed as a whole before it is open
            if (sequence := self._numbered.get(number)) is not None:
                self._engine.abort(sequence, message.reason)
                self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        del self._numbered[self._live.pop(sequence).number]
        self._behind.pop(sequence, None)

    def _step(self) -> None:
        try:
            changed: Iterable[Sequence] = self._engine.step()
            self._failures, self._healthy = 0, True
        except Exception:
            # The engine starts everybody over, to the same bits. What it had found out before it failed isn't said.
            log.exception("a step failed")
            self._failures += 1
            changed = list(self._live)
            if self._failures == MOST_FAILURES:
                self._failures, self._healthy = 0, False
                self._give_up([s for s in self._live if s.finish_reason is None])
        self._behind |= dict.fromkeys(s for s in changed if s in self._live)
        self._flush()
        if self._behind and not self._outgoing:
            self._send(self._news())

    def _give_up(self, sequences: list[Sequence]) -> None:
        numbers = [self._live[s].number for s in sequences]
        for sequence in sequences:
            self._engine.abort(sequence)
            self._forget(sequence)
        self._send(Failed(numbers))

    def _news(self) -> Grown:
        """All that the other side doesn't know yet."""
        found = []
        behind, self._behind = self._behind, {}
        for sequence in behind:
            live = self._live[sequence]
            known, done = live.told - len(sequence.prompt), sequence.finish_reason is not None
            tokens, growth = sequence.tokens[live.told :], None
            if not tokens and not done:
                continue
            if not known or done or sequence.logprobs:
                growth = Growth(
                    sequence.finish_reason,
                    sequence.stop_reason,
                    sequence.cached,
                    sequence.logprobs[known:],
                    [entry[0] for entry in sequence.prompt_logprobs] if live.score else [],
                )
            found.append((live.number, tokens, growth and tuple(growth)))
            live.told += len(tokens)
            if done:
                self._forget(sequence)
        return Grown(found, self._healthy)

    def _send(self, message: Any) -> None:
        self._outgoing += pack(message)
        self._flush()

    def _flush(self) -> None:
        """Sends what there is room for. A reader that lags gets fewer and longer messages, and nothing piles up."""
        while self._outgoing:
            try:
                sent = self._connection.send(self._outgoing, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            del self._outgoing[:sent]

    def _send_all(self) -> None:
        """Nothing else is to be done: waits until the other side knows everything."""
        if self._behind:
            self._outgoing += pack(self._news())
        self._connection.sendall(self._outgoing)
        self._outgoing.clear()
