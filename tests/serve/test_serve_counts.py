"""What is counted: tokens that were shown, tokens that were computed, and answers that are whole."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from herd.serve import ServeConfig
from tests.serve.live_server import Served, until
from tests.serve.scripted_server import DONE, STREAM, Request, event, load, only
from tests.serve.scripted_server import serving as scripted

LONG = [1 + i % 500 for i in range(500)]
PIECE = 64
CHUNKED = STREAM.replace(b"connection: close\r\n", b"transfer-encoding: chunked\r\n")
WHOLE = event({"content": "x"}) + event({"content": "y"}, "stop")


@pytest.mark.parametrize(("prompt", "texts"), [("def f(", 1), (["def f(", "import os"], 2), ([5, 6, 7], 1)])
def test_scoring_generates_nothing(served: Any, prompt: Any, texts: int) -> None:
    client = served.openai()
    how: dict[str, Any] = {"model": "tiny", "prompt": prompt, "echo": True, "logprobs": 1, "temperature": 0}
    scored, longer = (client.completions.create(max_tokens=most, **how) for most in (0, 2))
    assert scored.usage.completion_tokens == 0 and longer.usage.completion_tokens == 2 * texts
    assert scored.usage.prompt_tokens == longer.usage.prompt_tokens == scored.usage.total_tokens
    shown = sum(len(choice.logprobs.tokens) for choice in scored.choices)
    assert shown == scored.usage.prompt_tokens


def slowed(served: Served, seconds: float) -> list[int]:
    """Pieces of 64 tokens, each of which takes a while; their sizes, once they are computed."""
    driver = served.driver
    sizes: list[int] = []
    run = driver.llm.backend._run

    def slowly(spans: Any, wanted: Any, **outputs: Any) -> None:
        run(spans, wanted, **outputs)
        if "states" in outputs:
            time.sleep(seconds)
            sizes.append(len(wanted))

    driver.llm.backend._run = slowly
    driver._learn = lambda tokens, seconds: None
    driver._prompt_speed = 1.0
    return sizes


def counted(served: Served) -> float:
    """Tokens of prompts in the metrics."""
    with served.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith('herd_tokens_total{kind="prompt"'))


def leave(served: Served, texts: list[list[int]], sizes: list[int], after: int) -> None:
    """Ask for embeddings, and go away after so many pieces."""
    raw: socket.socket = served.post("/v1/embeddings", {"input": texts})
    until(lambda: len(sizes) >= after)
    raw.close()
    until(lambda: served.is_free())


def test_embeddings_that_nobody_waited_for(serving: Any, model_path: Path) -> None:
    """As many tokens count as were computed while somebody did: the piece that was under way at most does not."""
    with serving({"tiny": model_path}) as served:
        sizes = slowed(served, 0.1)
        leave(served, [LONG], sizes, 2)
        assert sum(sizes) < len(LONG) and sum(sizes) - counted(served) in (0, PIECE) and counted(served) >= PIECE
        before, computed = counted(served), sum(sizes)
        leave(served, [[5, 6, 7], [8, 9], LONG], sizes, len(sizes) + 4)  # two whole texts, and two pieces
        more = sum(sizes) - computed
        assert more - (counted(served) - before) in (0, PIECE) and more >= 5 + 2 * PIECE
        # One that waited behind another, and left before its turn, has computed nothing.
        before = counted(served)
        first = served.post("/v1/embeddings", {"input": [LONG]})
        until(lambda: served.driver._working is not None)
        second = served.post("/v1/embeddings", {"input": [LONG]})
        until(lambda: len(served.driver._works) == 1)
        second.close()
        until(lambda: not served.driver._works)
        assert b"200 OK" in first.recv(1 << 16)
        first.close()
        until(lambda: served.is_free())
        assert counted(served) - before == len(LONG)


def test_embeddings_that_took_too_long(serving: Any, model_path: Path) -> None:
    with serving({"tiny": model_path}, ServeConfig(port=0, deadline=0.35)) as served, served.client() as client:
        sizes = slowed(served, 0.1)
        late = client.post("/v1/embeddings", json={"input": LONG})
        assert late.status_code == 503, late.text
        until(lambda: served.is_free())
        assert 0 < sum(sizes) < len(LONG) and sum(sizes) - counted(served) in (0, PIECE)


@pytest.mark.parametrize(
    ("answer", "whole"),
    [
        (STREAM + WHOLE, True),
        (CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(WHOLE), WHOLE), True),
        (STREAM + WHOLE + b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}\n\n', True),
        (STREAM + WHOLE + DONE, True),
        (STREAM + event({"content": "x"}) + event({"content": "y"}), False),  # no reason
        (CHUNKED + b"%x\r\n%b\r\n" % (len(WHOLE), WHOLE), False),  # cut off
        (STREAM.replace(b"conn", b"content-length: 9999\r\nconn", 1) + WHOLE, False),
        (STREAM + WHOLE + b'data: {"error": {"message": "out of memory"}}\n\n', False),
    ],
)
def test_streams_that_end_without_a_last_word(answer: bytes, whole: bool) -> None:
    """Some servers say no [DONE]: with a finish_reason and HTTP's own end, an answer is whole."""

    async def script(request: Request) -> None:
        await request.write(answer)

    with scripted(script) as server:
        loaded = load(server, **({} if whole else {"warmup": 0}))
    stage = only(loaded)
    assert stage["requests"]["ok" if whole else "broken"] == 6, json.dumps(stage["errors"])
    if whole:
        assert stage["tokens"]["output"] == 12 and stage["e2e"]["n"] == 6
        for record in loaded.records[0]:
            assert record.finished is not None and record.started < record.finished <= record.ended
