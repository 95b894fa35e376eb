"""Requests that nobody sends in good faith: no status of 500, no dead process, and the server answers all the while."""

from __future__ import annotations

import json
import random
import socket
import string
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from herd.serve import ServeConfig
from herd.serve.app import ROUTES

POSTS = [path for method, path, _ in ROUTES if method == "POST"]
WORDS = [
    "", "x", "<|eot_id|>", "\x00", "\ud83d", "💥" * 50, "a" * 5000, "../../etc/passwd", "{{7*7}}", "%s%n", "null",
    "[[[[[[", '{"a":' * 40, "system", "user", "assistant", "tool", "text", "function", "auto", "required",
    "json_schema", "regex", "lark", "tiny", "(a+)+$",
    "[" * 200, "(?:" * 100, "x{1,100000}", 'start: start "a"', "start: /a*/",
]  # fmt: skip
NUMBERS: list[Any] = [
    0, 1, -1, 2**31, -(2**31), 2**63, 2**64, 1e308, -1e308, 1e-320, 0.5, 3.0, 10**30, True, False, None,
]  # fmt: skip
FIELDS = [
    "model", "messages", "prompt", "input", "content", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n",
    "seed", "stop", "stop_token_ids", "logit_bias", "logprobs", "top_logprobs", "stream", "stream_options", "tools",
    "tool_choice", "response_format", "tokens", "echo", "user",
    "metadata", "timeout", "ignore_eos", "repetition_penalty", "typical_p",
    "encoding_format", "add_special", "with_pieces", "parallel_tool_calls", "role", "type", "function", "name",
    "parameters", "arguments", "schema", "json_schema", "grammar", "text", "id", "include_usage", "best_of", "suffix",
]  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/embeddings": {"input": "hi"},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
    "/tokenize": {"content": "hi"},
    "/detokenize": {"tokens": [5, 6]},
}
SCHEMAS: list[Any] = [
    {"type": "object"}, {"$ref": "#"}, {"$ref": "http://x/y"}, {"anyOf": []}, {"enum": []}, {"type": "nonsense"},
    {"pattern": "(a+)+$", "type": "string"}, {"minLength": 10**9, "type": "string"},
    {"type": "array", "minItems": 10**9},
    {"properties": {str(i): {} for i in range(500)}}, {"allOf": [{"type": "string"}, {"type": "number"}]}, True, False,
    {"not": {}}, {"multipleOf": 0}, {"type": ["string", "null"], "format": "date"},
]  # fmt: skip


def anything(rng: random.Random, depth: int = 0) -> Any:
    """A value of JSON, of the kind that breaks things."""
    kind = rng.random()
    if depth > 3 or kind < 0.35:
        return rng.choice(WORDS)
    if kind < 0.6:
        return rng.choice(NUMBERS)
    if kind < 0.65:
        return rng.choice(SCHEMAS)
    if kind < 0.8:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(FIELDS + WORDS[:8]): anything(rng, depth + 1) for _ in range(rng.randrange(5))}


def request(rng: random.Random) -> tuple[str, str, dict[str, str], bytes]:
    """Method, path, headers and body."""
    path = rng.choice(
        [*POSTS] * 8 + ["/", "/health", "/v1/models", "/v1/models/" + "a" * 300, "/%00", "//", "/metrics"]
    )
    headers = {"Host": "localhost", "Content-Type": "application/json"}
    if path not in POSTS:
        return rng.choice(["GET", "HEAD", "OPTIONS", "DELETE", "TRACE", "PATCH"]), path, headers, b""
    body: Any = json.loads(json.dumps(GOOD.get(path, {})))
    if path in ("/v1/chat/completions", "/v1/completions"):
        body["max_tokens"] = rng.choice([1, 2, 5])
    for _ in range(rng.randrange(3)):  # mostly right, with a few things that are not
        field = rng.choice(FIELDS)
        body[field] = anything(rng)
        if rng.random() < 0.2:
            body["response_format"] = {
                "type": "json_schema", "json_schema": {"name": "x", "schema": rng.choice(SCHEMAS)},
            }  # fmt: skip
        elif rng.random() < 0.1:
            kind = rng.choice(["regex", "lark"])
            body["response_format"] = {"type": kind, "grammar": rng.choice(WORDS[1:])}
    if rng.random() < 0.1:
        body = anything(rng)
    data = json.dumps(body).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:  # broken bytes
        cut = rng.randrange(len(data) + 1)
        data = data[:cut] + rng.randbytes(rng.randrange(9)) + data[cut + rng.randrange(4) :]
    if rng.random() < 0.05:
        headers["Content-Type"] = rng.choice(["text/plain", "application/json; charset=utf-7", "", "application/xml"])
    if rng.random() < 0.05:
        name = "X-" + "".join(rng.choices(string.ascii_letters, k=rng.randrange(1, 30)))
        headers[name] = rng.choice(["x" * rng.choice([1, 1000, 20_000]), "ü", "a\tb"])
    return "POST", path, headers, data


def send(address: tuple[str, int], asked: tuple[str, str, dict[str, str], bytes], rng: random.Random) -> int | None:
    """The status; None where the server closed the connection, or we did."""
    method, path, headers, body = asked
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
    data = "\r\n".join(lines).encode("utf-8") + body
    with socket.create_connection(address, timeout=60) as raw:
        try:
            if rng.random() < 0.05:  # slow, and then gone
                raw.sendall(data[: rng.randrange(len(data))])
                return None
            raw.sendall(data)
            first = raw.makefile("rb").readline().split()
        except ConnectionError:
            return None
        return int(first[1]) if len(first) > 1 else None


def attack(served: Any, count: int) -> dict[int | None, int]:
    """Statuses by how often they came."""
    statuses: dict[int | None, int] = {}
    lock = threading.Lock()
    slowest, over = [0.0], threading.Event()

    def watch() -> None:
        with served.client() as client:
            while not over.wait(0.02):
                start = time.perf_counter()
                assert client.get("/health").status_code == 200
                slowest[0] = max(slowest[0], time.perf_counter() - start)

    def worker(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(count // 4):
            asked = request(rng)
            status = send(served.address, asked, rng)
            with lock:
                statuses[status] = statuses.get(status, 0) + 1
            assert status is None or status < 500 or status == 503, (status, asked)

    threads = [threading.Thread(target=watch), *(threading.Thread(target=worker, args=(i,)) for i in range(4))]
    failures: list[BaseException] = []
    threading.excepthook = lambda hook: failures.append(hook.exc_value or SystemError())
    try:
        for thread in threads:
            thread.start()
        for thread in threads[1:]:
            thread.join()
    finally:
        over.set()
        threads[0].join()
        threading.excepthook = threading.__excepthook__
    assert not failures, failures[0]
    print(f"\n{count} requests: {statuses}; /health took {slowest[0] * 1000:.0f} ms at most")
    with served.client() as client:
        answer = client.post("/v1/chat/completions", json={**GOOD["/v1/chat/completions"], "max_tokens": 2})
        assert answer.status_code == 200
    return statuses


def test_hostile_requests(serving: Any, model_path: Path) -> None:
    with serving({"tiny": model_path}, ServeConfig(port=0, deadline=20, body_timeout=2)) as served:
        statuses = attack(served, 1000)
        assert statuses.get(200, 0) > 100 and statuses.get(400, 0) > 300


@pytest.mark.slow
def test_ten_thousand_hostile_requests(serving: Any, model_path: Path) -> None:
    with serving({"tiny": model_path}, ServeConfig(port=0, deadline=20, body_timeout=2)) as served:
        attack(served, 10_000)
