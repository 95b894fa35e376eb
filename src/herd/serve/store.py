"""Responses that are kept: one SQLite file, in which everybody finds their own and nobody else's.

What is in it is data: JSON that goes out as it is, or is checked again before it becomes part of a prompt. One thread
has the only connection, and does one thing of each key after the other; each change is one transaction. There is a
bound on how many responses there are and on their size: beyond it, the key that has most of them loses the one that was
used longest ago, as a response or as the beginning of a conversation.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import orjson

from herd.errors import FileFormatError, ResourceError
from herd.serve.errors import ApiError
from herd.serve.pools import Pool

T = TypeVar("T")

_MARK = 0x48455244  # "HERD", in the header of the file
_VERSION = 1
_WAIT = 10.0  # seconds for another process that writes
_SCHEMA = (
    """CREATE TABLE responses (
        id TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        previous TEXT,
        used INTEGER NOT NULL, -- counts up with each use of any of them
        size INTEGER NOT NULL,
        response BLOB NOT NULL, -- JSON, as it was sent
        items BLOB NOT NULL, -- JSON: what the request had in its input, and what came out
        inputs INTEGER NOT NULL -- so many of the items
    )""",
    "CREATE INDEX by_owner ON responses (owner, used, size)",
    "CREATE INDEX by_use ON responses (used)",
    f"PRAGMA application_id = {_MARK}",
    f"PRAGMA user_version = {_VERSION}",
)
_NEXT_USE = "(SELECT COALESCE(MAX(used), 0) + 1 FROM responses)"


class Store:
    """See above. Raises ResourceError when the file cannot be used, and FileFormatError when it is another's."""

    def __init__(self, path: Path, *, max_rows: int = 10_000, max_bytes: int = 1 << 30) -> None:
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._thread = Pool("store", threads=1, share=1)
        try:
            self._db = self._thread.do(lambda: _open(path.absolute()))
        except BaseException:
            self._thread.close()
            raise

    def close(self) -> None:
        """Write everything into the one file."""
        self._thread.do(self._db.close)
        self._thread.close()

    async def put(
        self,
        owner: str,
        response: Mapping[str, Any],
        inputs: Sequence[Mapping[str, Any]],
        outputs: Sequence[Mapping[str, Any]],
    ) -> None:
        """Keep a response, which its `id` names, and the items that a conversation goes on with."""
        body, items = orjson.dumps(response), orjson.dumps([*inputs, *outputs])
        new, size = response["id"], len(body) + len(items)

        def work(db: sqlite3.Connection) -> None:
            values = (new, owner, response["previous_response_id"], size, body, items, len(inputs))
            db.execute(f"INSERT INTO responses VALUES (?, ?, ?, {_NEXT_USE}, ?, ?, ?, ?)", values)
            self._make_room(db, new)

        await self._do(owner, work)

    async def get(self, owner: str, name: str) -> bytes | None:
        """A response as JSON; None where its owner has none of that name."""

        def work(db: sqlite3.Connection) -> bytes | None:
            row = db.execute("SELECT response FROM responses WHERE id = ? AND owner = ?", (name, owner)).fetchone()
            return None if row is None else bytes(row[0])

        return await self._do(owner, work)

    async def inputs(
        self, owner: str, name: str, *, limit: int, newest_first: bool, after: str | None = None
    ) -> list[dict[str, Any]] | None:
        """Up to `limit` items of a response's input, of those that come after the one with the id `after`.

        None where its owner has no response of that name. Raises KeyError when there is no such item.
        """
        order, beyond = ("DESC", "<") if newest_first else ("ASC", ">")

        def work(db: sqlite3.Connection) -> list[dict[str, Any]] | None:
            found = (name, owner)
            if db.execute("SELECT 1 FROM responses WHERE id = ? AND owner = ?", found).fetchone() is None:
                return None
            # SQLite reads the list, without Python's lock; only what is asked for becomes objects.
            item = "FROM responses, json_each(CAST(items AS TEXT)) item WHERE responses.id = ? AND item.key < inputs"
            place = None
            if after is not None:
                at = f"SELECT item.key {item} AND json_extract(item.value, '$.id') = ?"
                place = db.execute(at, (name, after)).fetchone()
                if place is None:
                    raise KeyError(after)
            page = f"SELECT item.value {item} AND (? OR item.key {beyond} ?) ORDER BY item.key {order} LIMIT ?"
            rows = db.execute(page, (name, place is None, place and place[0], limit))
            return [orjson.loads(value) for (value,) in rows]

        return await self._do(owner, work)

    async def delete(self, owner: str, name: str) -> bool:
        """Whether there was one."""

        def work(db: sqlite3.Connection) -> bool:
            return db.execute("DELETE FROM responses WHERE id = ? AND owner = ?", (name, owner)).rowcount > 0

        return await self._do(owner, work)

    async def conversation(self, owner: str, name: str, max_bytes: int) -> list[dict[str, Any]]:
        """All items up to a response and with it, oldest first. Raises ApiError when a part is missing or too large."""

        def work(db: sqlite3.Connection) -> list[bytes]:
            parts: list[bytes] = []
            names: list[str] = []
            size = 0
            wanted: str | None = name
            while wanted is not None:
                found = (wanted, owner)
                row = db.execute("SELECT previous, items FROM responses WHERE id = ? AND owner = ?", found).fetchone()
                if row is None:
                    raise _not_found(name, wanted)
                parts.append(row[1])
                names.append(wanted)
                size += len(row[1])
                if size > max_bytes:
                    raise _too_long(max_bytes)
                wanted = row[0]
            (use,) = db.execute(f"SELECT {_NEXT_USE}").fetchone()
            db.executemany("UPDATE responses SET used = ? WHERE id = ?", [(use, each) for each in names])
            return parts

        parts = await self._do(owner, work)
        return await asyncio.to_thread(lambda: [item for part in reversed(parts) for item in orjson.loads(part)])

    def _make_room(self, db: sqlite3.Connection, new: str) -> None:
        """Delete until all is within the bounds; the new one stays in any case."""
        rows, size = db.execute("SELECT COUNT(*), SUM(size) FROM responses").fetchone()
        while rows > 1 and (rows > self._max_rows or size > self._max_bytes):
            (owner,) = db.execute(
                "SELECT owner FROM responses WHERE id != ? GROUP BY owner "
                "ORDER BY COUNT(*) / ? + SUM(size) / ? DESC LIMIT 1",
                (new, float(self._max_rows), float(self._max_bytes)),
            ).fetchone()
            name, freed = db.execute(
                "SELECT id, size FROM responses WHERE owner = ? AND id != ? ORDER BY used, rowid LIMIT 1", (owner, new)
            ).fetchone()
            db.execute("DELETE FROM responses WHERE id = ?", (name,))
            rows, size = rows - 1, size - freed

    async def _do(self, owner: str, work: Callable[[sqlite3.Connection], T]) -> T:
        """The result of `work`, which is one transaction, in the thread that has the connection."""

        def run() -> T:
            try:
                with _transaction(self._db):
                    return work(self._db)
            except sqlite3.Error as error:
                raise ResourceError(f"the store of responses cannot be used ({error})") from error

        return await self._thread.run(owner, run)


def _not_found(name: str, missing: str) -> ApiError:
    message = f"previous response with id {name[:100]!r} not found"
    if missing != name:
        message = f"the conversation of {name[:100]!r} goes back to {missing[:100]!r}, which is not stored any more"
    return ApiError(400, message, param="previous_response_id", code="previous_response_not_found")


def _too_long(limit: int) -> ApiError:
    message = f"the conversation is larger than the {limit} bytes that a request may have"
    return ApiError(400, message, param="previous_response_id", code="conversation_too_long")


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _open(path: Path) -> sqlite3.Connection:
    """The database, made if it is not there."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite gives the files beside it the same rights
    except OSError as error:
        reason = error.strerror or str(error)
        raise ResourceError(
            f"the store cannot be opened ({reason})", value=path, fix="choose another --store"
        ) from None
    db = sqlite3.connect(path, timeout=_WAIT, isolation_level=None)
    try:
        db.execute("PRAGMA trusted_schema = OFF")
        db.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten
        db.execute("PRAGMA auto_vacuum = FULL")
        with _transaction(db):
            _check_or_make(db, path)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(f"PRAGMA journal_size_limit = {16 << 20}")
    except sqlite3.OperationalError as error:
        db.close()
        raise ResourceError(f"the store cannot be used ({error})", value=path) from None
    except sqlite3.DatabaseError as error:
        db.close()
        raise FileFormatError(f"this is no store of responses ({error})", file=path) from None
    except BaseException:
        db.close()
        raise
    return db


def _check_or_make(db: sqlite3.Connection, path: Path) -> None:
    mark = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0 and mark == version == 0:
        for statement in _SCHEMA:
            db.execute(statement)
    elif mark != _MARK:
        raise FileFormatError("this is another program's database", file=path, fix="choose another --store")
    elif version != _VERSION:
        raise FileFormatError(
            "this store was made by another version of Herd", file=path, value=version, allowed=str(_VERSION)
        )
