"""The same request to real server processes, under any load and after a restart: one answer, to the bit."""

import random
from typing import NamedTuple

import openai
import pytest
from serving import Process, at_once

from jaxdet.testing import write_tiny_model

TOKENS = 12
COMPLETION = {
    "model": "tiny",
    "prompt": "The sea is",
    "max_tokens": TOKENS,
    "temperature": 0.8,
    "logprobs": 2,
}
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": TOKENS,
    "temperature": 0,
    "logprobs": True,
    "top_logprobs": 2,
}
OPTIONS = ("--served-model-name", "tiny", "--max-model-len", "256", "--max-num-seqs", "16")


class Answer(NamedTuple):
    """Log-probabilities come through JSON with every bit of their float32."""

    text: str
    logprobs: tuple[float, ...]
    tops: str
    fingerprint: str


async def completion(client, stream: bool, **change) -> Answer:
    found = await client.completions.create(**(COMPLETION | change), stream=stream)
    text, values, tops, prints = "", [], [], set()
    for chunk in [c async for c in found] if stream else [found]:
        (choice,) = chunk.choices
        text += choice.text
        values += choice.logprobs.token_logprobs
        tops += choice.logprobs.top_logprobs
        prints.add(chunk.system_fingerprint)
    return Answer(text, tuple(values), str(tops), "".join(prints))


async def chat(client, stream: bool) -> Answer:
    found = await client.chat.completions.create(**CHAT, stream=stream)
    text, entries, prints = "", [], set()
    for chunk in [c async for c in found] if stream else [found]:
        (choice,) = chunk.choices
        text += (choice.delta if stream else choice.message).content or ""
        entries += choice.logprobs.content if choice.logprobs else []
        prints.add(chunk.system_fingerprint)
    tops = str([[(t.token, t.logprob) for t in e.top_logprobs] for e in entries])
    return Answer(text, tuple(e.logprob for e in entries), tops, "".join(prints))


async def other(client, seed: int) -> None:
    """Traffic of other shapes: long and short, penalised, several at once, broken off, refused."""
    rng = random.Random(seed)
    asked = {
        "model": "tiny",
        "prompt": "y" * rng.randint(1, 150),
        "max_tokens": rng.randint(1, 40),
        "seed": seed,
    }
    kind = seed % 4
    if kind == 0:
        await client.completions.create(**asked, n=3, frequency_penalty=0.5)
    elif kind == 1:
        stream = await client.completions.create(**asked, stream=True, extra_body={"ignore_eos": True})
        async for _ in stream:
            break
        await stream.close()
    elif kind == 2:
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(**(asked | {"prompt": "y" * 300}))
    else:
        await client.completions.create(**asked, extra_body={"top_k": 5, "min_p": 0.1, "ignore_eos": True})


def answers(process: Process, clients: int) -> tuple[list[Answer], list[Answer]]:
    """The completions and chats of so many clients at once, every other one of which asks for something else."""
    tasks, kinds = [], []
    for i in range(clients):
        kind = ("completion", "other", "chat", "other")[i % 4]
        kinds.append(kind)
        if kind == "other":
            tasks.append(lambda client, i=i: other(client, i))
        else:
            ask = completion if kind == "completion" else chat
            tasks.append(lambda client, ask=ask, i=i: ask(client, i % 8 < 4))
    found = list(zip(kinds, at_once(process, tasks), strict=True))
    return [a for kind, a in found if kind == "completion"], [a for kind, a in found if kind == "chat"]


@pytest.mark.slow
def test_one_answer_from_any_server_under_any_load(tmp_path):
    folder = write_tiny_model(tmp_path / "tiny")
    completions: list[Answer] = []
    chats: list[Answer] = []
    for run in range(2):
        options = (*OPTIONS, "--seed", "7", "--http-processes", str(1 + run))
        with Process(folder, tmp_path / f"log{run}", *options) as process:
            for clients in (1, 8, 64, 1):
                of_completions, of_chats = answers(process, clients)
                completions += of_completions
                chats += of_chats
                process.wait_until_idle()
            (changed,) = at_once(process, [lambda client: completion(client, False, seed=8)])
            completed = process.metric("jaxdet_sequences_finished_total")
    assert len(completions) == 2 * (1 + 2 + 16 + 1) and len(chats) == 2 * (2 + 16) and completed > 36
    for found in (completions, chats):
        assert len({*found}) == 1
        assert len(found[0].logprobs) == TOKENS and found[0].fingerprint.startswith("fp_")
    assert completions[0].fingerprint == chats[0].fingerprint
    # Control: another seed is another answer of the same server; other weights' rounding is another server.
    assert changed.fingerprint == completions[0].fingerprint and changed[:2] != completions[0][:2]
    with Process(folder, tmp_path / "control", *OPTIONS, "--seed", "7", "--dtype", "bfloat16") as process:
        (control, *_), _ = answers(process, 1)
    assert control.fingerprint != completions[0].fingerprint and control.logprobs != completions[0].logprobs
