"""The engine's side of the server: runs what the HTTP processes ask for, and tells each what became of it."""

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
    Full,
    Grown,
    Growth,
    Open,
    Opened,
    Refused,
    State,
    Told,
    pack,
    receive,
)

log = logging.getLogger("jaxdet.server")

MOST_FAILURES = 3
"""Steps that may fail in a row before the requests in them are given up."""
LAG_SECONDS = 0.01
"""How often a reader that lags is tried again while there is no work."""


@dataclasses.dataclass(eq=False)
class _Peer:
    """An HTTP process; its numbers are its own."""

    connection: socket.socket
    numbered: dict[int, Sequence] = dataclasses.field(default_factory=dict)
    compiling: dict[int, Open] = dataclasses.field(default_factory=dict)
    """What waits for its grammar, by its first number."""
    behind: dict[Sequence, None] = dataclasses.field(default_factory=dict)
    """Sequences that it doesn't know the latest of."""
    outgoing: bytearray = dataclasses.field(default_factory=bytearray)
    """What the socket had no room for yet."""
    state: State = dataclasses.field(default_factory=State)
    """As it knows it."""


@dataclasses.dataclass(eq=False, slots=True)
class _Live:
    peer: _Peer
    number: int
    told: int
    """How many of its tokens, the prompt's among them, the peer knows."""
    score: bool


class EngineHost:
    """Runs an engine for the other ends of connections. It never waits for any of them while there is work.

    Args:
        engine: nobody else may use it while this runs.
        start: makes a constraint of a grammar.
        connections: stream sockets; `messages` says what goes over them.
        capacity: sequences that may run or wait, of all connections together; more are refused.
    """

    def __init__(
        self,
        engine: Engine,
        start: Callable[[Grammar], Constraint],
        connections: Iterable[socket.socket],
        *,
        capacity: int,
    ):
        self._engine, self._start, self._capacity = engine, start, capacity
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._peers = [_Peer(connection) for connection in connections]
        self._live: dict[Sequence, _Live] = {}
        self._compilers = ThreadPoolExecutor(2, "grammar")
        self._failures, self._healthy = 0, True

    def run(self) -> None:
        """Returns once all the other sides have closed their connections; what still runs of one is ended then."""
        readers = [
            threading.Thread(target=self._read, args=[p], name="reader", daemon=True) for p in self._peers
        ]
        for reader in readers:
            reader.start()
        connections = [peer.connection for peer in self._peers]
        try:
            while self._peers:
                if busy := self._engine.has_work:
                    patience = None
                else:
                    self._tell_all()
                    patience = LAG_SECONDS if any(peer.outgoing for peer in self._peers) else None
                try:
                    act = self._inbox.get(block=not busy, timeout=patience)
                except queue.Empty:
                    if busy:
                        self._step()
                else:
                    act()
        finally:
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)  # which the reader hears, too
            for reader, connection in zip(readers, connections, strict=True):
                reader.join()
                connection.close()
            self._compilers.shutdown(wait=False, cancel_futures=True)
            for sequence in list(self._live):
                self._engine.abort(sequence)

    def _read(self, peer: _Peer) -> None:
        """In a thread of its own: waits for messages."""
        acts = {
            Open: self._prepare,
            Close: self._close,
            Ask: lambda peer, _: self._send(peer, Told(self._engine.stats(), self._taken)),
        }
        try:
            while (message := receive(peer.connection)) is not None:
                self._inbox.put(functools.partial(acts[type(message)], peer, message))
        except OSError as error:
            log.debug("the connection broke: %s", error)
        finally:
            self._inbox.put(lambda: self._leave(peer))

    def _leave(self, peer: _Peer) -> None:
        """The other side has closed the connection."""
        self._peers.remove(peer)
        peer.compiling.clear()
        for sequence in list(peer.numbered.values()):
            self._engine.abort(sequence)
            self._forget(sequence)

    @property
    def _taken(self) -> int:
        """Sequences that run or wait."""
        return len(self._live) + sum(o.size for peer in self._peers for o in peer.compiling.values())

    def _prepare(self, peer: _Peer, message: Open) -> None:
        """Compiles a grammar beside the engine, which some take longer than many steps."""
        if (taken := self._taken) + message.size > self._capacity:
            self._send(peer, Full(message.first, taken))
        elif message.grammar is None:
            self._open(peer, message, None)
        else:
            peer.compiling[message.first] = message
            self._compilers.submit(self._start, message.grammar).add_done_callback(
                lambda found: self._inbox.put(lambda: self._open_compiled(peer, message, found))
            )

    def _open_compiled(self, peer: _Peer, message: Open, found: "Future[Constraint]") -> None:
        if peer.compiling.pop(message.first, None) is None:  # closed in the meantime
            return
        try:
            constraint = found.result()
        except Exception as error:
            self._refuse(peer, message, error)
        else:
            self._open(peer, message, constraint)

    def _open(self, peer: _Peer, message: Open, constraint: Constraint | None) -> None:
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
            self._refuse(peer, message, error)
            return
        for number, sequence in enumerate(opened, message.first):
            self._live[sequence] = _Live(peer, number, len(sequence.prompt), message.score)
            peer.numbered[number] = sequence
        self._send(peer, Opened(message.first))

    def _refuse(self, peer: _Peer, message: Open, error: Exception) -> None:
        if not isinstance(error, ValueError):
            log.error("a request could not be queued", exc_info=error)
            error = RuntimeError(f"{type(error).__name__}: {error}")
        self._send(peer, Refused(message.first, error))

    def _close(self, peer: _Peer, message: Close) -> None:
        for number in message.numbers:
            peer.compiling.pop(number, None)  # a request is closed as a whole before it is open
            if (sequence := peer.numbered.get(number)) is not None:
                self._engine.abort(sequence, message.reason)
                self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        live = self._live.pop(sequence)
        del live.peer.numbered[live.number]
        live.peer.behind.pop(sequence, None)

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
        for sequence in changed:
            if (live := self._live.get(sequence)) is not None:
                live.peer.behind[sequence] = None
        self._tell_all()

    def _give_up(self, sequences: list[Sequence]) -> None:
        numbers: dict[_Peer, list[int]] = {}
        for sequence in sequences:
            live = self._live[sequence]
            numbers.setdefault(live.peer, []).append(live.number)
            self._engine.abort(sequence)
            self._forget(sequence)
        for peer, those in numbers.items():
            self._send(peer, Failed(those))

    def _news(self, peer: _Peer) -> Grown:
        """All that a peer doesn't know yet."""
        found = []
        behind, peer.behind = peer.behind, {}
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
        return Grown(found)

    @property
    def _state(self) -> State:
        return State(self._healthy, self._taken >= self._capacity)

    def _tell_all(self) -> None:
        """The latest, to whom there is room for it: who lags gets fewer and longer messages, and nothing piles up."""
        for peer in self._peers:
            self._flush(peer)
            if peer.behind and not peer.outgoing:
                self._send(peer, self._news(peer))
        for peer in self._peers:  # only now: whose end was told takes no room any more
            if not peer.outgoing:
                self._send(peer)

    def _send(self, peer: _Peer, *messages: Any) -> None:
        """Messages, and before them how things stand if that is new."""
        if (state := self._state) != peer.state:
            peer.state = state
            messages = (state, *messages)
        for message in messages:
            peer.outgoing += pack(message)
        self._flush(peer)

    def _flush(self, peer: _Peer) -> None:
        """Sends what there is room for."""
        while peer.outgoing:
            try:
                sent = peer.connection.send(peer.outgoing, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:  # it is gone; its reader hears so, too
                log.debug("the connection broke: %s", error)
                peer.outgoing.clear()
                return
            del peer.outgoing[:sent]
