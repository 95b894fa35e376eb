"""What a refused request is told: the limit that is reached, the option that helps, the name that is repeated."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest

from herd.serve import Keys, ServeConfig
from herd.serve.keys import StoredKey
from herd.serve.server import check_exposure
from tests.serve.live_server import Served, until

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


def test_a_reached_limit_has_its_name_and_number(serving: Any, model_path: Path) -> None:
    limits: dict[str, dict[str, Any]] = {
        "concurrent": {"concurrent": 1},
        "requests_per_minute": {"requests_per_minute": 3},
        "tokens_per_minute": {"tokens_per_minute": 1500},
    }
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in limits}
    keys = Keys((), {name: StoredKey(sha256=hashes[name], **limit) for name, limit in limits.items()})
    with serving({"tiny": model_path}, ServeConfig(port=0), keys) as served:

        def refused(name: str, path: str = CHAT, **body: Any) -> str:
            with served.client(headers={"x-api-key": name}) as client:
                for _ in range(10):
                    answer = client.post(path, json=body or HELLO)
                    if answer.status_code == 429:
                        assert int(answer.headers["retry-after"]) >= 1
                        return str(answer.json()["error"]["message"])
            raise AssertionError("it was not refused")

        several = {"prompt": ["a", "b", "c"], "max_tokens": 2}
        assert refused("requests_per_minute", "/v1/completions", **several).endswith("requests_per_minute is 3")
        assert refused("requests_per_minute").endswith("requests_per_minute is 3")
        assert refused("tokens_per_minute", **{**HELLO, "max_tokens": 400}).endswith("tokens_per_minute is 1,500")
        with served.paused():
            held = served.post(CHAT, HELLO, "concurrent")
            until(lambda: served.driver.running == 1)
            assert refused("concurrent").endswith("concurrent is 1")
            held.close()


def test_refused_names_and_pages_are_told_the_option(served: Served) -> None:
    with served.client() as client:
        for header, option in (
            ({"host": "vm:8000"}, "--allow-host"),
            ({"origin": "http://elsewhere"}, "--allow-origin"),
            ({"sec-fetch-site": "cross-site"}, "--allow-origin"),
        ):
            refused = client.post(CHAT, json=HELLO, headers=header)
            assert refused.status_code == 403 and option in refused.json()["error"]["message"]


def test_an_open_server_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "herd.serve"):
        check_exposure(ServeConfig(insecure=True), Keys())
        check_exposure(ServeConfig(host="0.0.0.0", insecure=True), Keys(["a-real-key"]))
        assert not caplog.records
        check_exposure(ServeConfig(host="0.0.0.0", insecure=True), Keys())
    assert "--insecure" in caplog.text and "0.0.0.0" in caplog.text


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("n", b'{"n": 1, %s, "n": 2}'),
        ("n", b'{"n": 1, %s, "\\u006e": 2}'),
        ("max_tokens", b'{"max_tokens": 1, %s}'),
        ("type", b'{%s, "response_format": {"type": "text", "type": "text"}}'),
        ("big", b'{%s, "logit_bias": {"big": ' + b"1" * 300 + b', "big": [[]]}}'),
        ("user", b'{%s, "user": "' + b"x" * 20_000 + b'", "user": "y"}'),
    ],
)
def test_a_repeated_name_is_no_request(served: Served, name: str, body: bytes) -> None:
    """Parsers disagree about which value it has."""
    rest = b'"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2'
    with served.client() as client:
        refused = client.post(CHAT, content=body.replace(b"%s", rest), headers={"content-type": "application/json"})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "invalid_json", name)
    assert f"{name!r} stands more than once" in error["message"]


def test_official_clients_do_not_repeat_what_ran_into_its_own_timeout(serving: Any, model_path: Path) -> None:
    import openai

    with serving({"tiny": model_path}, ServeConfig(port=0, deadline=5)) as served, served.paused():
        held = served.post(CHAT, HELLO)
        until(lambda: served.driver.running == 1)
        client = served.openai().with_options(max_retries=2)
        with pytest.raises(openai.BadRequestError) as late:
            client.chat.completions.create(model="tiny", extra_body={"timeout": 0.1}, **HELLO)
        assert late.value.code == "timeout_exceeded" and late.value.param == "timeout"
        with served.client() as plain:
            responses = [line for line in plain.get("/metrics").text.splitlines() if f'path="{CHAT}"' in line]
        assert [line for line in responses if "herd_responses_total" in line] == [
            f'herd_responses_total{{path="{CHAT}",status="400"}} 1.0'
        ]
        held.close()
