"""Runs requests through one engine and keeps it full."""

from collections.abc import Iterable, Iterator

from jaxdet.api.errors import ApiError
from jaxdet.batch.request import Query, Requests, Result, failure
from jaxdet.batch.source import Line
from jaxdet.llm import LLM
from jaxdet.request import Request


class BatchEngine:
    """Answers lines as they come; several run at once, and each is answered as soon as it is done.

    Args:
        llm: nobody else may use it while `answers` runs.
    """

    def __init__(self, llm: LLM, requests: Requests):
        self._llm, self._requests = llm, requests
        # As many again wait as run, so that nothing idles while answers are written.
        self._most = 2 * llm.engine.scheduler.max_num_seqs
        self._open: dict[Request, _Open] = {}

    @property
    def idle(self) -> bool:
        return not self._open

    def answers(self, lines: Iterable[Line | None]) -> Iterator[Result]:
        """One result for each line, in the order in which they get ready.

        Args:
            lines: read as the engine has room; None: there is none at the moment.
        """
        source, more = iter(lines), True
        try:
            while more or self._open:
                while more and len(self._open) < self._most:
                    try:
                        line = next(source)
                    except StopIteration:
                        more = False
                        break
                    if line is None:
                        break
                    found = self._requests.read(line)
                    if isinstance(found, Query):
                        found = self._submit(found)
                    if found is not None:
                        yield found
                if self._open:
                    yield from self._step()
        finally:
            for request in self._open:
                self._llm.abort(request)
            self._open.clear()

    def _submit(self, query: Query) -> Result | None:
        entry = _Open(query, [])
        try:
            constraint = self._requests.constraint(query.task)
            for prompt in query.task.prompts:
                entry.requests.append(self._llm.submit(prompt, query.task.params, constraint=constraint))
        except ValueError as error:
            for request in entry.requests:
                self._llm.abort(request)
            return failure(query.number, query.id, ApiError(400, str(error)))
        self._open |= dict.fromkeys(entry.requests, entry)
        return None

    def _step(self) -> Iterator[Result]:
        for request in self._llm.step():
            entry = self._open.get(request)
            if entry is not None and all(r.finished for r in entry.requests):
                for done in entry.requests:
                    self._llm.abort(done)  # forgets it
                    del self._open[done]
                yield self._result(entry)

    def _result(self, entry: "_Open") -> Result:
        try:
            outputs = [request.output() for request in entry.requests]
        except Exception as error:  # its text could not be decoded; the others go on
            query, what = entry.query, f"{type(error).__name__}: {error}"
            return failure(query.number, query.id, ApiError(500, what))
        return self._requests.write(entry.query, outputs)


class _Open:
    """A request under way: one prompt or several."""

    def __init__(self, query: Query, requests: list[Request]):
        self.query, self.requests = query, requests
