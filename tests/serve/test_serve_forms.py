"""What a server says of a request that it does not answer, wherever that is decided; and names that are refused."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from herd.config import parse_options
from herd.errors import ResourceError, UsageError
from herd.serve import Keys, ServeConfig
from herd.serve.errors import ApiError
from herd.serve.keys import StoredKey
from herd.serve.server import listen

KEY = "correct-horse-battery"
SAID = [{"role": "user", "content": "hi"}]


def test_errors_in_anthropics_form(serving: Any, model_path: Path) -> None:
    """Its clients look for the type of the whole; OpenAI's paths have none."""
    auth = {"authorization": f"Bearer {KEY}"}
    body = {"messages": SAID, "max_tokens": 3}
    with serving({"tiny": model_path}, keys=Keys([KEY])) as served, served.client() as client:
        for path, expected in (("/v1/messages", "error"), ("/v1/messages/count_tokens", "error"), ("/tokenize", None)):
            answers = [
                client.post(path, json=body),
                client.post(path, content="x", headers={**auth, "content-type": "text/plain"}),
                client.get(path, headers=auth),
                client.post(path, json={}, headers=auth),
            ]
            assert [answer.status_code for answer in answers] == [401, 415, 405, 400]
            for answer in answers:
                assert answer.json().get("type") == expected and answer.json()["error"]["message"]
        served.driver.stop(ApiError(503, "the server stops", code="stopped"))
        refused = client.post("/v1/messages", json={**body, "stream": True}, headers=auth)
        assert refused.status_code == 503 and refused.json()["type"] == "error"


def test_pieces_are_bound_for_dialogues_too(served: Any) -> None:
    most = 1 << 16
    with served.client() as client:

        def ask(text: str, **more: Any) -> Any:
            return client.post("/tokenize", json={"messages": [{"role": "user", "content": text}], **more})

        long = ask("x" * (most + 1), with_pieces=True)
        assert long.status_code == 400 and long.json()["error"]["param"] == "with_pieces"
        assert ask("x" * (most + 1)).status_code == 200
        tool = {"type": "function", "function": {"name": "f", "description": "x" * most}}
        assert ask("x", with_pieces=True, tools=[tool]).status_code == 400
        text = "héllo there, all of you " * 700  # in several slices
        plain, pieces = ask(text).json()["tokens"], ask(text, with_pieces=True).json()["tokens"]
        assert [piece["id"] for piece in pieces] == plain and len(plain) > 2048
        assert client.post("/detokenize", json={"tokens": plain}).json()["content"].count("there, all of you") == 700
        assert all(set(piece) == {"id", "piece"} for piece in pieces)


def test_keys_must_differ() -> None:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    entry, other = StoredKey(sha256=digest, concurrent=1), StoredKey(sha256="0" * 64)
    for given, stored, said in (
        ([KEY], {"ann": entry}, "key, ann"),
        ([KEY, KEY], {}, "key-1, key-2"),
        ([], {"ann": entry, "bob": entry}, "ann, bob"),
        ([KEY], {"key": other}, "same name"),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            Keys(given, stored)
        assert KEY not in str(caught.value)
    assert Keys([KEY], {"ann": other}).needed


@pytest.mark.parametrize("name", ["herd.example:80", "http://herd.example", "herd.example/x", "u@herd.example", ""])
def test_names_that_no_request_can_have(name: str) -> None:
    with pytest.raises(UsageError, match=r"^--allow-host is not valid; got [^(]*; allowed: a name"):
        parse_options(ServeConfig, {"allow_hosts": ("a", name)})


@pytest.mark.parametrize(
    "url", ["friend.example", "https://", "https://friend.example/app", "ftp://x", "*", "null", "https://u@x", "x:80"]
)
def test_origins_that_no_page_can_have(url: str) -> None:
    with pytest.raises(UsageError, match=r"^--allow-origin is not valid; got [^(]*; allowed: http"):
        parse_options(ServeConfig, {"allow_origins": ("http://a", url)})


def test_names_as_requests_have_them(serving: Any, model_path: Path) -> None:
    config = ServeConfig(
        port=0,
        allow_hosts=("HERD.example.", "[::2]"),
        allow_origins=("https://Friend.Example/", "http://other.example:80", "http://third.example:81"),
    )
    with serving({"tiny": model_path}, config) as served, served.client() as client:
        for host, status in (("herd.example", 200), ("Herd.Example:9", 200), ("[::2]:1", 200), ("other.example", 403)):
            assert client.get("/health", headers={"host": host}).status_code == status
        for origin, status in (
            ("https://friend.example", 200),
            ("http://other.example", 200),
            ("http://third.example:81", 200),
            ("http://third.example", 403),
            ("http://friend.example", 403),
        ):
            answer = client.post("/tokenize", content=json.dumps({"content": "x"}), headers={
                "origin": origin, "content-type": "application/json"
            })  # fmt: skip
            assert answer.status_code == status
            assert answer.headers.get("access-control-allow-origin") == (origin if status == 200 else None)


def test_refusals_are_counted(serving: Any, model_path: Path) -> None:
    """By the route's path where there is one, so that nobody fills the figures with names."""
    auth = {"authorization": f"Bearer {KEY}"}
    with serving({"tiny": model_path}, keys=Keys([KEY])) as served, served.client() as client:
        assert client.get("/v1/models/some/name").status_code == 401
        assert client.get("/nothing/here", headers=auth).status_code == 404
        assert client.get("/tokenize", headers=auth).status_code == 405
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 403
        assert client.post("/tokenize", content="x", headers={**auth, "content-type": "text/plain"}).status_code == 415
        assert client.post("/tokenize", content="x" * (9 << 20), headers={
            **auth, "content-type": "application/json"
        }).status_code == 413  # fmt: skip
        page = client.get("/metrics", headers=auth).text
    for path, status in (
        ("/v1/models/{name}", 401), ("other", 404), ("/tokenize", 405), ("/health", 403), ("/tokenize", 415),
        ("/tokenize", 413),
    ):  # fmt: skip
        assert f'herd_responses_total{{path="{path}",status="{status}"}} 1.0' in page, (path, status)


def test_the_description_says_what_needs_no_key_and_what_a_query_may_have(served: Any) -> None:
    with served.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    assert [path for path in paths for of in paths[path].values() if of.get("security") == []] == ["/health"]
    listing = paths["/v1/responses/{id}/input_items"]["get"]["parameters"]
    assert [(each["name"], each["in"]) for each in listing] == [
        ("id", "path"), ("order", "query"), ("limit", "query"), ("after", "query")
    ]  # fmt: skip


@pytest.mark.parametrize(("host", "option"), [("nohost.invalid", "--host"), ("192.0.2.1", "--host"), (None, "--port")])
def test_what_to_change_where_an_address_cannot_be_had(host: str | None, option: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = ServeConfig(host=host or "127.0.0.1", port=taken.getsockname()[1])
        with pytest.raises(ResourceError, match=f"choose another {option}"):
            listen(config)


def test_what_belongs_to_the_other_half_of_tokenize_is_refused(served: Any) -> None:
    with served.client() as client:
        for body, param in (
            ({"messages": SAID, "add_special": True}, "add_special"),
            ({"content": "x", "tools": []}, "tools"),
        ):
            answer = client.post("/tokenize", json=body)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == param
        assert client.post("/tokenize", json={"content": "x", "add_special": True}).status_code == 200
