"""`herd bench serve` without a server: what is asked for, and how prompts, addresses and events are read."""

from __future__ import annotations

import itertools
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.errors import FileFormatError, HerdError, UsageError
from herd.serve.load.client import EventStream, split
from herd.serve.load.prompts import Workload, read_prompts
from tests.serve.scripted_server import bench


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert bench(f"http://127.0.0.1:{port}") == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ftp://x",), "not the address of a server"),
        (("http://x:port",), "not a URL"),
        (("http://x/v1?a=b",), "not the address of a server"),
        (("localhost", "--rate", "0"), "a rate is above 0"),
        (("localhost", "--rate", "nan"), "rates"),
        (("localhost", "--rates", "1,two"), "--rates is no list"),
        (("localhost", "--rate", "1", "--concurrency", "2"), "three kinds of load"),
        (("localhost", "--concurrency", "0"), "--concurrency is no list"),
        (("localhost", "--concurrency", "2", "--sweep"), "a sweep begins with one rate"),
        (("localhost", "--duration", "5", "--requests", "5"), "either a duration or a number"),
        (("localhost", "--max-tokens", "5-1"), "max_tokens"),
        (("localhost", "--max-tokens", "many"), "--max-tokens is no range"),
        (("localhost", "--extra", "[]"), "--extra is no JSON object"),
        (("localhost", "--slo", "ttft=fast"), "--slo is no list of bounds"),
        (("localhost", "--slo", "speed=1"), "--slo is no list of bounds"),
        (("localhost", "--slo", "ttft=-1"), "ttft"),
        (("localhost", "--endpoint", "embeddings"), "endpoint"),
        (("localhost", "--records", "/no/such/folder/r"), "--records cannot be written"),
        (("no-such-host.invalid",), "no such host"),
    ],
)
def test_wrong_use_is_exit_code_2(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("", FileFormatError, "no prompts"),
        ("{", FileFormatError, "line 1 is not JSON"),
        ('{"prompt": "x"}\n[]', FileFormatError, "line 2 is no request"),
        ('{"prompt": "x", "messages": []}', FileFormatError, "line 1 is no request"),
        ('{"messages": [1]}', FileFormatError, "line 1 is no request"),
        ('{"messages": [{"role": "user"}]}', UsageError, "--endpoint chat"),
    ],
)
def test_files_of_prompts(text: str, kind: type[HerdError], words: str, tmp_path: Path) -> None:
    (tmp_path / "p").write_text(text)
    with pytest.raises(kind, match=words):
        read_prompts(tmp_path / "p", "completions")
    with pytest.raises(FileFormatError, match="cannot be read"):
        read_prompts(tmp_path / "none", "chat")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("localhost:8000", (False, "localhost", 8000, "/v1")),
        ("http://127.0.0.1", (False, "127.0.0.1", 80, "/v1")),
        ("https://api.example.com/v1/", (True, "api.example.com", 443, "/v1")),
        ("https://host/gateway", (True, "host", 443, "/gateway/v1")),
        ("http://[::1]:9/v1", (False, "::1", 9, "/v1")),
    ],
)
def test_addresses(url: str, expected: tuple[bool, str, int, str]) -> None:
    assert split(url) == expected


LINES = st.sampled_from(
    [b"data: a\n", b"data:b\r\n", b"data: {}\n", b": ping\n", b"event: x\n", b"\n", b"\r\n", b"d\n"]
)


@given(st.lists(LINES), st.lists(st.integers(0, 60)))
def test_events_do_not_depend_on_how_bytes_come(lines: list[bytes], cuts: list[int]) -> None:
    text = b"".join(lines)
    whole = EventStream().feed(text)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stream = EventStream()
    pieces = [text[begin:end] for begin, end in itertools.pairwise(bounds)]
    assert [event for piece in pieces for event in stream.feed(piece)] == whole
    expected, data = [], []
    for line in text.replace(b"\r", b"").split(b"\n")[:-1]:
        if not line and data:
            expected.append(b"\n".join(data))
            data = []
        elif line.startswith(b"data:"):
            data.append(line[5:].strip())
    assert whole == expected


def test_an_endless_event_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herd.serve.load.client.MAX_LINE", 1000)
    stream = EventStream()
    assert stream.feed(b"data: " + b"x" * 900) == []
    with pytest.raises(ValueError, match="endless"):
        stream.feed(b"x" * 100)


def test_prompts_depend_on_number_and_seed_alone() -> None:
    def workload(**more: Any) -> Workload:
        given: dict[str, Any] = {"endpoint": "chat", "model": "m", "words": 50, "shared_words": 10, "seed": 1}
        return Workload(**(given | {"max_tokens": (1, 100)} | more))

    bodies = [workload().body(i) for i in range(100)]
    assert bodies == [workload().body(i) for i in range(100)] and len(set(bodies)) == 100
    assert not set(bodies) & {workload(seed=2).body(i) for i in range(100)}
