"""OpenAI's batch format wants every `custom_id` once: it's all that tells whose answer a line is."""

from collections.abc import Iterator

from jaxdet.api.errors import ApiError
from jaxdet.batch.request import Result, failure, parse
from jaxdet.batch.source import Source


def duplicates(source: Source) -> Iterator[Result]:
    """The errors of lines whose `custom_id` an earlier line has, be that one right or wrong.

    Reads all of the source, and keeps the ids meanwhile: about 130 bytes of memory each, if they are short.
    """
    first: dict[str, int] = {}
    for part in source.slices:
        for line in source.read(part):
            name = _custom_id(line.data)
            if name is not None and (earlier := first.setdefault(name, line.number)) != line.number:
                message = f"custom_id: line {earlier} has the same; give each line its own"
                error = ApiError(400, message, param="custom_id", code="duplicate_custom_id")
                yield failure(line.number, name, error)


def _custom_id(data: bytes) -> str | None:
    """A line's id, if it has one; what else is wrong with the line is found out when its turn comes."""
    if b'"custom_id"' not in data:  # the other format needn't be read twice
        return None
    try:
        name = parse(data).get("custom_id")
    except ValueError:
        return None
    return name if isinstance(name, str) else None
