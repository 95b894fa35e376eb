"""`--log-requests`: one line for each request, refused ones too, and nothing of what was said."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from herd.serve import Keys, ServeConfig
from tests.serve.live_server import until

KEY, SECRET = "correct-horse-battery", "the launch code is 0000"
LINE = re.compile(
    r"\S+ (?P<path>\S+) (?P<status>\d{3}) \d+\.\d\ds (?P<size>\d+)B(?P<cut> cut)?( key=(?P<key>\S+))? 127\.0\.0\.1"
)
ASKED = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 3, "temperature": 0}


@pytest.fixture(scope="module")
def logging_server(serving: Any, model_path: Path) -> Iterator[Any]:
    with serving({"tiny": model_path}, ServeConfig(port=0, log_requests=True), Keys([KEY])) as found:
        yield found


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """Waits for so many lines of requests; gives each one's parts."""

    def wait(count: int) -> list[dict[str, Any]]:
        def found() -> list[re.Match[str]]:
            return [match for text in caplog.messages if (match := LINE.fullmatch(text))]

        until(lambda: len(found()) >= count, 30)
        assert len(found()) == count, caplog.messages
        assert not any(SECRET[:10] in text or KEY in text for text in caplog.messages)
        return [match.groupdict() for match in found()]

    with caplog.at_level(logging.INFO, "herd.serve"):
        yield wait


def test_an_answer_a_stream_and_a_refusal(logging_server: Any, lines: Any) -> None:
    with logging_server.client(headers={"authorization": f"Bearer {KEY}"}) as client:
        body = client.post("/v1/chat/completions", json=ASKED).content
        streamed = client.post("/v1/chat/completions", json=ASKED | {"stream": True}).content
        wrong = client.post("/v1/chat/completions", json=ASKED | {"temperature": -1}).content
    found = lines(3)  # a stream's line may come after that of the next request: it is closed first
    told = {(line["status"], int(line["size"])) for line in found}
    assert told == {("200", len(body)), ("200", len(streamed)), ("400", len(wrong))}
    assert {line["path"] for line in found} == {"/v1/chat/completions"} and {line["key"] for line in found} == {"key"}
    assert not any(line["cut"] for line in found)


def test_who_has_no_key_is_told_of_by_address(logging_server: Any, lines: Any) -> None:
    with logging_server.client() as client:
        client.post("/v1/chat/completions?key=" + SECRET, json=ASKED)
        client.get("/nothing%0a14:00 ERROR made up")
    found = lines(2)
    assert [line["status"] for line in found] == ["401", "401"] and not any(line["key"] for line in found)
    assert {line["path"] for line in found} == {"/v1/chat/completions", "/nothing%0a14:00%20ERROR%20made%20up"}


def test_probes_are_told_of_where_they_fail(logging_server: Any, lines: Any) -> None:
    with logging_server.client() as client:
        assert client.get("/health").status_code == 200
        assert client.get("/metrics", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        assert client.get("/metrics").status_code == 401
    (line,) = lines(1)
    assert (line["path"], line["status"]) == ("/metrics", "401")


def test_clients_that_go(logging_server: Any, lines: Any) -> None:
    long = ASKED | {"max_tokens": 400, "ignore_eos": True}
    with logging_server.paused():
        raw = logging_server.post("/v1/chat/completions", long, KEY)
        until(lambda: logging_server.driver.waiting + logging_server.driver.running > 0)
        raw.shutdown(socket.SHUT_RDWR)
        raw.close()
    assert lines(1)[0]["status"] == "499"

    raw = logging_server.post("/v1/chat/completions", long | {"stream": True}, KEY)
    raw.recv(1)  # the answer has begun
    raw.close()
    line = lines(2)[1]
    assert (line["status"], line["cut"]) == ("200", " cut")


def test_without_the_option_nothing_is_written(served: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "herd.serve"), served.client() as client:
        assert client.post("/v1/chat/completions", json=ASKED).status_code == 200
    assert not [text for text in caplog.messages if LINE.fullmatch(text)]
