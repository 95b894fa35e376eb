"""Which replica a request goes to: the one that has computed its beginning, as long as it is not much busier.

A replica keeps what it has computed of prompts (the engine's prefix cache). So requests that begin alike, such as the
turns of one conversation or all questions behind one system prompt, should meet the same replica; but not so many of
them that others have nothing to do. The rule:

- The beginning of a request is cut into blocks of 256 bytes; each is known by a hash of it and of all before it.
- Of the replicas that answer no more than `SLACK` requests above the one that answers the fewest, the one is chosen
  that was sent the most of these blocks, from the first one on.
- Without a match, and between equal ones, the least busy one is chosen; between those that are equally busy, the one
  that was chosen the longest ago.

What is remembered is a guess at what the caches hold, and costs only time where it is wrong. Nothing here needs Ray.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

BLOCK = 256
"""Bytes that are known by one hash: some 60 tokens of English."""
MOST_BLOCKS = 256
"""Of one request: what differs after 64 KiB only is taken for equal."""
SLACK = 4
"""Requests by which a replica may be busier than the least busy one, and still be chosen for what it remembers."""
MEMORY = 1 << 18
"""Blocks that are remembered, of all replicas together; some 40 MB."""
_LEAST_MEMORY = 4 * MOST_BLOCKS

# In the order in which they stand in a prompt.
_FIELDS = ("model", "instructions", "system", "tools", "prompt", "messages", "input")


def beginning(body: Mapping[str, Any]) -> bytes:
    """The first bytes of what a request's prompt is made of, as they stand in its JSON."""
    try:
        return orjson.dumps([body[name] for name in _FIELDS if name in body])[: BLOCK * MOST_BLOCKS]
    except orjson.JSONEncodeError:  # what lies 255 deep in each other can be read, and not written
        return b""


def blocks_of(text: bytes, secret: bytes = b"") -> list[bytes]:
    """A hash for each whole block of `text`, of it and all before it; nobody without the secret can aim at one."""
    blocks: list[bytes] = []
    before = b""
    for start in range(0, min(len(text), BLOCK * MOST_BLOCKS) - BLOCK + 1, BLOCK):
        before = hashlib.blake2b(before + text[start : start + BLOCK], digest_size=8, key=secret).digest()
        blocks.append(before)
    return blocks


class PrefixRouter:
    """See above. Replicas are known by their numbers, from 0 on. Not thread-safe."""

    def __init__(self, replicas: int, *, slack: int = SLACK, memory: int = MEMORY) -> None:
        self._slack = slack
        self._capacity = max(_LEAST_MEMORY, memory // replicas)  # of one
        self._seen: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in range(replicas)]
        self._chosen = [0] * replicas  # when, as a number that counts up
        self._secret = secrets.token_bytes(16)

    def choose(self, text: bytes, loads: Mapping[int, int]) -> int:
        """One of the replicas in `loads`, which says how many requests each answers, for what begins with `text`.

        Raises ValueError when there is none.
        """
        blocks = blocks_of(text, self._secret)
        most = min(loads.values()) + self._slack

        def merit(replica: int) -> tuple[int, int, int]:
            return self._match(replica, blocks), -loads[replica], -self._chosen[replica]

        found = max((replica for replica, load in loads.items() if load <= most), key=merit)
        self._chosen[found] = max(self._chosen) + 1
        self._remember(found, blocks)
        return found

    def forget(self, replica: int) -> None:
        """It has been started again, and has computed nothing."""
        self._seen[replica].clear()

    def _match(self, replica: int, blocks: Sequence[bytes]) -> int:
        """So many of the blocks it has been sent, from the first one on."""
        seen = self._seen[replica]
        return next((i for i, block in enumerate(blocks) if block not in seen), len(blocks))

    def _remember(self, replica: int, blocks: Sequence[bytes]) -> None:
        seen = self._seen[replica]
        for block in reversed(blocks):  # the first one is used the most, and goes last
            seen[block] = None
            seen.move_to_end(block)
        while len(seen) > self._capacity:
            seen.popitem(last=False)
