"""What one key sends keeps nobody else out: requests count before their bodies are read, bodies have a bound together,
and large ones are parsed, and kept responses read, for one key after the other."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from herd.serve import Keys, ServeConfig
from herd.serve.api import body as body_module
from herd.serve.bodies import Bodies
from herd.serve.errors import ApiError
from herd.serve.keys import StoredKey
from herd.serve.store import Store
from tests.serve.live_server import Served, until

HEAD = (
    "POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer key-of-{who}\r\n"
    "Content-Type: application/json\r\n"
)


def keys(**limits: dict[str, Any]) -> Keys:
    return Keys(
        stored={
            who: StoredKey(sha256=hashlib.sha256(f"key-of-{who}".encode()).hexdigest(), **more)
            for who, more in limits.items()
        }
    )


def begun(served: Served, who: str, body: bytes, length: int, path: str = "/tokenize") -> socket.socket:
    """A request of which so much has been sent."""
    raw = socket.create_connection(served.address, timeout=20)
    raw.sendall((HEAD.format(path=path, who=who) + f"Content-Length: {length}\r\n\r\n").encode() + body)
    return raw


def answer(raw: socket.socket) -> tuple[int, str | None]:
    """Its status, and the code of an error."""
    lines = raw.makefile("rb")
    status, length = int(lines.readline().split()[1]), 0
    while (line := lines.readline().strip()) != b"":
        name, _, value = line.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    return status, json.loads(lines.read(length)).get("error", {}).get("code")


def test_a_request_counts_before_its_body_is_read(serving: Any, model_path: Path) -> None:
    with serving({"tiny": model_path}, keys=keys(ann={"concurrent": 1}, bob={})) as served:
        (_, ann), _ = served.app._keys._clients
        with begun(served, "ann", b'{"content": ', 20) as slow:
            until(lambda: ann.running == 1)
            with begun(served, "ann", b'{"content": ', 20) as other:
                assert answer(other) == (429, "rate_limit_exceeded")  # at once, with nothing but a beginning
            slow.sendall(b'"hello"}')
            assert answer(slow) == (200, None)
        until(lambda: ann.running == 0)
        with begun(served, "ann", b'{"content": 1}', 14) as wrong, begun(served, "ann", b"", 9_999_999) as large:
            assert {answer(wrong)[0], answer(large)[0]} == {400, 413}
        with begun(served, "ann", b'{"content": ', 20):
            until(lambda: ann.running == 1)
        until(lambda: ann.running == 0)  # it went without the rest of its body


def test_bodies_have_a_bound_together(serving: Any, model_path: Path) -> None:
    """Sixteen of the largest, of which one key may have eight; and the bytes come back."""
    config = ServeConfig(port=0, max_body_bytes=100_000)
    part = b'{"content": "' + b"x" * 90_000
    with serving({"tiny": model_path}, config, keys(ann={}, bob={}, eve={})) as served:
        bodies: Bodies = served.app._app.state.bodies
        held = [begun(served, who, part, 100_000) for who in ("ann", "bob") for _ in range(8)]
        try:
            until(lambda: bodies._held.total() >= 16 * len(part))
            with begun(served, "ann", part, 100_000) as more:
                assert answer(more) == (429, "too_many_bytes")
            fits = [begun(served, "eve", part, 100_000) for _ in range(1)]
            with begun(served, "eve", part, 100_000) as more:
                assert answer(more) == (503, "too_many_bytes")
            held += fits
            with served.client(headers={"authorization": "Bearer key-of-ann"}) as client:
                assert client.post("/tokenize", json={"content": "small"}).status_code == 200
        finally:
            for raw in held:
                raw.close()
        until(lambda: not +bodies._held)
        with begun(served, "ann", part + b'"}', len(part) + 2) as whole:
            assert answer(whole)[0] == 200


def test_the_bound_is_exact() -> None:
    bodies = Bodies(ServeConfig(max_body_bytes=1024))
    for key in ("ann", "bob"):
        bodies.hold(key, 8 * 1024)
        with pytest.raises(ApiError) as caught:
            bodies.hold(key, 1)
        assert caught.value.status == 429
    with pytest.raises(ApiError) as caught:
        bodies.hold("eve", 1)
    assert caught.value.status == 503
    bodies.free("ann", 5)
    bodies.hold("eve", 5)


def slowly(work: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def after(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return work(*arguments, **options)

    return after


def test_large_bodies_are_parsed_for_one_key_after_the_other(
    serving: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_module, "check_size", slowly(body_module.check_size, 0.1))
    monkeypatch.setattr(body_module, "_LARGE", 1000)
    large = json.dumps({"content": "x " * 1000}).encode()
    with serving({"tiny": model_path}, keys=keys(ann={}, bob={})) as served:
        waiting = [begun(served, "ann", large, len(large)) for _ in range(20)]
        until(lambda: served.app._app.state.bodies._held["ann"] >= 15 * len(large))
        start = time.monotonic()
        with begun(served, "bob", large, len(large)) as other:
            assert answer(other) == (200, None)
        assert time.monotonic() - start < 0.8  # of the two seconds that all of ann's take
        assert [answer(raw) for raw in waiting] == [(200, None)] * 20
        for raw in waiting:
            raw.close()


def test_kept_responses_are_read_for_one_key_after_the_other(
    serving: Any, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServeConfig(port=0, store=tmp_path / "kept.db")
    with serving({"tiny": model_path}, config, keys(ann={}, bob={})) as served:

        def client(who: str) -> Any:
            return served.client(headers={"authorization": f"Bearer key-of-{who}"})

        with client("ann") as ann, client("bob") as bob:
            made = {}
            for who, http in (("ann", ann), ("bob", bob)):
                made[who] = http.post("/v1/responses", json={"input": "x", "max_output_tokens": 2}).json()["id"]
            slow = types.SimpleNamespace(loads=slowly(json.loads, 0.1))
            monkeypatch.setattr("herd.serve.store.orjson", slow)
            get = f"GET /v1/responses/{made['ann']}/input_items HTTP/1.1\r\nHost: localhost\r\n"
            waiting = [socket.create_connection(served.address, timeout=20) for _ in range(20)]
            for raw in waiting:
                raw.sendall((get + "Authorization: Bearer key-of-ann\r\n\r\n").encode())
            until(lambda: served.app._keys._clients[0][1].running >= 15)
            start = time.monotonic()
            assert bob.get(f"/v1/responses/{made['bob']}").status_code == 200
            assert time.monotonic() - start < 0.8
            assert [answer(raw) for raw in waiting] == [(200, None)] * 20
            for raw in waiting:
                raw.close()


def test_reading_what_was_kept_counts(serving: Any, model_path: Path, tmp_path: Path) -> None:
    config = ServeConfig(port=0, store=tmp_path / "kept.db")
    limited = keys(ann={"requests_per_minute": 4})
    with (
        serving({"tiny": model_path}, config, limited) as served,
        served.client(headers={"authorization": "Bearer key-of-ann"}) as client,
    ):
        name = client.post("/v1/responses", json={"input": "x", "max_output_tokens": 2}).json()["id"]
        path = f"/v1/responses/{name}"
        statuses = [
            client.request(method, path + end).status_code
            for method, end in (("GET", ""), ("GET", "/input_items"), ("DELETE", ""), ("GET", ""), ("DELETE", ""))
        ]
        assert statuses == [200, 200, 200, 429, 429]
        assert served.app._keys._clients[0][1].running == 0


def test_a_page_of_items(tmp_path: Path) -> None:
    """As slicing the list gives it, whatever is in the texts; nothing but the page is parsed."""
    store = Store(tmp_path / "a.db")
    inputs = [{"id": f"i{i}", "text": f'ü\u0000"\\ {i} 😀', "number": 1.5, "none": None} for i in range(30)]
    response = {"id": "a", "previous_response_id": None}

    async def check() -> None:
        await store.put("ann", response, inputs, [{"id": "out"}])
        for newest_first in (False, True):
            ordered = inputs[::-1] if newest_first else inputs
            for after in (None, 0, 7, 29):
                rest = ordered if after is None else ordered[after + 1 :]
                name = None if after is None else ordered[after]["id"]
                for limit in (1, 5, 100):
                    how: dict[str, Any] = {"limit": limit, "newest_first": newest_first, "after": name}
                    assert await store.inputs("ann", "a", **how) == rest[:limit]
        for wrong in ("out", "i30", ""):
            with pytest.raises(KeyError):
                await store.inputs("ann", "a", limit=5, newest_first=True, after=wrong)
        assert await store.inputs("bob", "a", limit=5, newest_first=True) is None

    asyncio.run(check())
    store.close()
