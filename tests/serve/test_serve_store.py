"""Responses that are kept: whose they are, how many, how a conversation is found again, and files that are no store."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import stat
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai")

from openai.types.responses import ResponseItemList  # noqa: E402

from herd.errors import FileFormatError, ResourceError  # noqa: E402
from herd.serve import Keys, ServeConfig  # noqa: E402
from herd.serve.errors import ApiError  # noqa: E402
from herd.serve.store import Store  # noqa: E402


def make(client: Any, **body: Any) -> Any:
    """A response, as it came."""
    create = client.responses.with_raw_response.create
    return json.loads(create(model="tiny", max_output_tokens=3, **body).http_response.content)


def test_what_is_kept(storing: Any, alice: Any) -> None:
    items: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Light!", "id": "msg_mine"},
        {"type": "function_call", "call_id": "c1", "name": "switch", "arguments": '{"on": true}'},
        {"type": "function_call_output", "call_id": "c1", "output": "done"},
        {"role": "assistant", "content": "It is on."},
        {"role": "user", "content": [{"type": "input_text", "text": "Thanks."}]},
    ]
    answer = make(alice, input=items)
    listing = alice.responses.input_items.with_raw_response.list(answer["id"], order="asc").http_response.content
    found = ResponseItemList.model_validate_json(listing, strict=True)
    assert not any(item.model_extra for item in found.data)
    kinds = ["message", "message", "function_call", "function_call_output", "message", "message"]
    assert [item.type for item in found.data] == kinds
    assert found.data[1].id == "msg_mine" == json.loads(listing)["data"][1]["id"] and not found.has_more
    pages = list(alice.responses.input_items.list(answer["id"], limit=2))  # the client turns the pages by itself
    assert [item.id for item in pages] == [item.id for item in found.data][::-1]
    for query in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "msg_other"}, {"include": ["x"]}):
        with pytest.raises(openai.BadRequestError):
            alice.responses.input_items.list(answer["id"], **query)
    with pytest.raises(openai.BadRequestError):
        list(alice.responses.retrieve(answer["id"], stream=True))

    gone = make(alice, input="x", store=False)
    assert gone["store"] is False
    with pytest.raises(openai.NotFoundError):
        alice.responses.retrieve(gone["id"])
    with storing.client(headers={"authorization": "Bearer key-of-alice"}) as http:
        deleted = http.delete(f"/v1/responses/{answer['id']}")
        assert deleted.json() == {"id": answer["id"], "object": "response", "deleted": True}
    for call in (alice.responses.retrieve, alice.responses.delete, alice.responses.input_items.list):
        with pytest.raises(openai.NotFoundError) as caught:
            call(answer["id"])
        assert caught.value.code == "response_not_found"


def test_asynchronously(storing: Any) -> None:
    async def several() -> set[str]:
        async with openai.AsyncOpenAI(base_url=f"{storing.url}/v1", api_key="key-of-alice") as client:
            create = client.responses.create
            made = await asyncio.gather(
                *[create(input=f"Count to {i}.", model="tiny", max_output_tokens=9) for i in range(12)]
            )
            kept = await asyncio.gather(*[client.responses.retrieve(each.id) for each in made])
            assert [each.to_dict() for each in kept] == [each.to_dict() for each in made]
            return {each.output_text for each in kept}

    assert len(asyncio.run(several())) > 1


def test_another_key_finds_nothing(storing: Any, alice: Any, bob: Any) -> None:
    answer = make(alice, input="A secret.")
    for call in (bob.responses.retrieve, bob.responses.delete, bob.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            call(answer["id"])
    with pytest.raises(openai.BadRequestError) as caught:
        make(bob, input="x", previous_response_id=answer["id"])
    assert caught.value.code == "previous_response_not_found" and caught.value.param == "previous_response_id"
    assert alice.responses.retrieve(answer["id"]).id == answer["id"]
    with storing.client(headers={"x-api-key": "key-of-alice"}) as http:  # the same key, said in another way
        assert http.get(f"/v1/responses/{answer['id']}").json() == answer


def test_it_is_there_after_a_restart_for_the_key_and_not_for_its_place(
    serving: Any, model_path: Path, tmp_path: Path
) -> None:
    """Keys on the command line have no names but their places, and these change."""
    config = ServeConfig(port=0, store=tmp_path / "kept.db")
    with serving({"tiny": model_path}, config, Keys(["first-key"])) as served:
        answer = make(served.openai("first-key"), input="x")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.db"]
    assert stat.S_IMODE((tmp_path / "kept.db").stat().st_mode) == 0o600
    with serving({"tiny": model_path}, config, Keys(["second-key", "first-key"])) as served:
        with pytest.raises(openai.NotFoundError):
            served.openai("second-key").responses.retrieve(answer["id"])
        client = served.openai("first-key")
        kept = client.responses.with_raw_response.retrieve(answer["id"]).http_response.content
        assert json.loads(kept) == answer
        assert make(client, input="y", previous_response_id=answer["id"])["output"]


def test_without_a_store(served: Any) -> None:
    client = served.openai("anything")
    answer = make(client, input="Who are you?")
    assert answer["store"] is False
    for change in ({"store": True}, {"previous_response_id": answer["id"]}):
        with pytest.raises(openai.BadRequestError, match="--store FILE") as caught:
            make(client, input="x", **change)
        assert caught.value.param == next(iter(change))
    with pytest.raises(openai.NotFoundError, match="--store FILE"):
        client.responses.retrieve(answer["id"])


def run(work: Any) -> Any:
    return asyncio.run(work)


def entry(name: str, previous: str | None = None, size: int = 10) -> tuple[dict[str, Any], list[Any], list[Any]]:
    response = {"id": name, "previous_response_id": previous, "text": "x" * size}
    return response, [{"in": name}], [{"out": name}]


def test_the_store_is_bounded(tmp_path: Path) -> None:
    """Who has most loses the one used longest ago; others keep theirs."""
    store = Store(tmp_path / "a.db", max_rows=6)
    run(store.put("alice", *entry("a0")))
    run(store.put("bob", *entry("b0")))
    run(store.put("bob", *entry("b1")))
    for i in range(2, 9):
        run(store.put("bob", *entry(f"b{i}", previous="b0" if i == 2 else f"b{i - 1}")))
        if i < 6:
            assert run(store.conversation("bob", f"b{i}", 1 << 20))[0] == {"in": "b0"}
    names = [name for name in [f"b{i}" for i in range(9)] if run(store.get("bob", name))]
    assert len(names) == 5 and "b1" not in names and names[-1] == "b8" and run(store.get("alice", "a0"))
    assert run(store.get("bob", "a0")) is None and not run(store.delete("bob", "a0"))
    store.close()

    store = Store(tmp_path / "b.db", max_bytes=5000)
    for i in range(20):
        run(store.put("alice", *entry(f"a{i}", size=1000)))
    assert [i for i in range(20) if run(store.get("alice", f"a{i}"))] == [16, 17, 18, 19]
    run(store.put("alice", *entry("huge", size=9000)))  # the new one stays, whatever it takes
    assert run(store.get("alice", "huge")) and run(store.get("alice", "a19")) is None
    store.close()
    assert (tmp_path / "b.db").stat().st_size < 100_000


def test_a_long_conversation_in_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.db")
    for i in range(50):
        run(store.put("alice", *entry(f"a{i}", previous=f"a{i - 1}" if i else None)))
    items = run(store.conversation("alice", "a49", 1 << 20))
    assert items == [{kind: f"a{i}"} for i in range(50) for kind in ("in", "out")]
    with pytest.raises(ApiError, match="larger than the 100 bytes"):
        run(store.conversation("alice", "a49", 100))
    assert run(store.delete("alice", "a20"))
    with pytest.raises(ApiError, match="goes back to 'a20'"):
        run(store.conversation("alice", "a49", 1 << 20))
    assert len(run(store.conversation("alice", "a19", 1 << 20))) == 40
    with pytest.raises(ApiError, match="not found"):
        run(store.conversation("bob", "a19", 1 << 20))
    with pytest.raises(ResourceError, match="UNIQUE"):
        run(store.put("alice", *entry("a1")))
    store.close()


def test_two_servers_may_have_one_store(tmp_path: Path) -> None:
    one, other = Store(tmp_path / "a.db", max_rows=30), Store(tmp_path / "a.db", max_rows=30)

    async def both() -> None:
        puts = [
            store.put("alice", *entry(f"{name}{i}")) for i in range(40) for name, store in (("a", one), ("b", other))
        ]
        await asyncio.gather(*puts)

    run(both())
    found = [run(one.get("alice", f"{name}{i}")) for name in "ab" for i in range(40)]
    assert sum(each is not None for each in found) == 30
    one.close()
    other.close()


def test_files_that_are_no_store(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello " * 1000)
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE t (x)")
    for name, error in (("text", FileFormatError), ("other.db", FileFormatError), ("no/such", ResourceError)):
        with pytest.raises(error, match=name):
            Store(tmp_path / name)
    with pytest.raises(ResourceError):
        Store(tmp_path)
    assert (tmp_path / "text").read_text() == "hello " * 1000
    store = Store(tmp_path / "new.db")
    store.close()
    with sqlite3.connect(tmp_path / "new.db") as db:
        db.execute("PRAGMA user_version = 7")
    with pytest.raises(FileFormatError, match="another version"):
        Store(tmp_path / "new.db")


def test_what_was_deleted_is_not_in_the_file(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.db")
    for i in range(20):
        response, inputs, outputs = entry(f"a{i}")
        run(store.put("alice", {**response, "text": f"SECRET-{i}-"}, inputs, outputs))
    for i in range(0, 20, 3):
        assert run(store.delete("alice", f"a{i}"))
    store.close()
    found = (tmp_path / "a.db").read_bytes()
    assert [i for i in range(20) if f"SECRET-{i}-".encode() not in found] == list(range(0, 20, 3))
