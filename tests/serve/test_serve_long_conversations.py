"""Conversations that are kept, and requests of many items, cost others little, however many items there are."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from herd.serve.api import responses
from herd.serve.api.response_items import MessageItem, fit
from herd.serve.errors import ApiError
from tests.serve.live_server import Served

ALICE = {"authorization": "Bearer key-of-alice"}


def ask(served: Served, items: Any, previous: str | None = None, **more: Any) -> Any:
    body = {"input": items, "max_output_tokens": 2, "temperature": 0, "previous_response_id": previous, **more}
    with served.client(headers=ALICE) as client:
        return client.post("/v1/responses", json=body)


def turns(count: int) -> list[dict[str, str]]:
    return [{"role": role, "content": "x"} for _ in range(count) for role in ("user", "assistant")]


@pytest.mark.parametrize("truncation", ["auto", "disabled"])
def test_a_conversation_has_no_more_items_than_a_request(
    storing: Served, monkeypatch: pytest.MonkeyPatch, truncation: str
) -> None:
    monkeypatch.setattr(responses, "_MAX_ITEMS", 20)
    read: list[int] = []
    item_of = responses.read_item
    first = ask(storing, [*turns(8), {"role": "user", "content": "y"}]).json()["id"]  # 17, and the answer
    assert ask(storing, turns(1), first, truncation=truncation).status_code == 200
    monkeypatch.setattr(responses, "read_item", lambda *found: read.append(1) or item_of(*found))
    refused = ask(storing, turns(2), first, truncation=truncation)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (400, "conversation_too_long")
    assert error["param"] == "previous_response_id" and "18 items" in error["message"]
    assert len(read) == 4  # the request's own: none of those that were kept


def test_items_that_cannot_all_have_a_token_are_not_encoded() -> None:
    """16 characters for each token of a context of 100."""
    sizes: list[int] = []

    def encode(kept: Any) -> list[int]:
        sizes.append(len(kept))
        return [1] * (5 * len(kept))

    items = [MessageItem(role="user" if i % 2 == 0 else "assistant", content="") for i in range(4000)]
    prompt, dropped = fit([*items, MessageItem(role="user", content="y")], encode, 80, 1600)
    assert max(sizes) <= 100 and len(dropped) == 4001 - len(prompt) // 5 and len(prompt) <= 80
    with pytest.raises(ApiError, match="too long by far"):
        fit([MessageItem(role="user", content="")] * 200, encode, 80, 1600)


def test_long_requests_are_parsed_beside_the_event_loop(storing: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[str] = set()

    def noting(of: Any) -> Any:
        def note(*found: Any) -> Any:
            threads.add(threading.current_thread().name)
            return of(*found)

        return note

    for name in ("read_item", "with_outputs", "check_ids"):
        monkeypatch.setattr(responses, name, noting(getattr(responses, name)))
    answer = ask(storing, [*turns(1000), {"role": "user", "content": "y"}], truncation="auto")
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["dropped_items"]) > 1800
    again = ask(storing, "z", answer.json()["id"], truncation="auto")
    assert again.status_code == 200, again.text
    assert threads and all("asyncio" in name or name.startswith("herd-texts") for name in threads), threads
