"""Who may ask, and how much: keys are known by their hashes only, and each has limits of its own."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field

from herd.config import Config, parse_config
from herd.errors import UsageError
from herd.files import read_json_object

NOBODY = "anonymous"
"""The name that all requests have where no key is asked for."""

_MIN_KEY = 8  # characters
_OF_NOTHING = hashlib.sha256(b"").hexdigest()


class KeyLimits(Config):
    """What the holder of a key may do; None: as much as the server can."""

    concurrent: int | None = Field(default=None, ge=1, le=100_000, description="Requests at a time.")
    requests_per_minute: float | None = Field(
        default=None, gt=0, description="Requests, averaged over a minute; one of several prompts or texts counts each."
    )
    tokens_per_minute: float | None = Field(default=None, gt=0, description="Tokens of prompts and answers, the same.")
    weight: float = Field(default=1.0, gt=0, le=1000, description="Share of the model where all want all of it.")


class StoredKey(KeyLimits):
    """A key in a file."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="The key's hash: `printf %s KEY | sha256sum`.")


@dataclass
class Bucket:
    """So much a minute: what was not used adds up to one minute's worth."""

    per_minute: float
    clock: Callable[[], float] = time.monotonic
    level: float = field(init=False)
    at: float = field(init=False)

    def __post_init__(self) -> None:
        self.level, self.at = self.per_minute, self.clock()

    def wait_for(self, amount: float) -> float:
        """Seconds until `amount` is there; more than a minute's worth is never, so a minute's worth counts then."""
        now = self.clock()
        self.level = min(self.per_minute, self.level + (now - self.at) * self.per_minute / 60)
        self.at = now
        missing = min(amount, self.per_minute) - self.level
        return max(0.0, missing * 60 / self.per_minute)

    def take(self, amount: float) -> None:
        """Use it up; the level may go below zero where the amount was not known before."""
        self.wait_for(0.0)
        self.level -= amount


class Client:
    """The holder of a key, while the server runs."""

    def __init__(
        self, name: str, limits: KeyLimits, clock: Callable[[], float] = time.monotonic, *, owner: str = ""
    ) -> None:
        self.name = name
        self.owner = owner
        """The key's hash, as names of keys may change: whose kept responses are theirs. Empty for `NOBODY`."""
        self.limits = limits
        self.shares = False
        """Others have keys of their own for the same models."""
        self.running = 0
        self._requests = None if limits.requests_per_minute is None else Bucket(limits.requests_per_minute, clock)
        self._tokens = None if limits.tokens_per_minute is None else Bucket(limits.tokens_per_minute, clock)

    @property
    def most(self) -> float:
        """Prompts of one request at most: more than a minute's worth is never there."""
        per_minute = self.limits.requests_per_minute
        return math.inf if per_minute is None else max(1.0, per_minute)

    def wait(self, prompts: int = 1) -> tuple[str, float]:
        """The limit that another request, of so many prompts, waits for longest, and its seconds; 0 now."""
        full = self.limits.concurrent is not None and self.running >= self.limits.concurrent
        seconds = {
            "concurrent": 1.0 if full else 0.0,
            "requests_per_minute": self.wait_for_prompts(prompts),
            "tokens_per_minute": self.wait_for_tokens(1),
        }
        return max(seconds.items(), key=lambda each: each[1])

    def enter(self, prompts: int = 1) -> None:
        self.running += 1
        if self._requests is not None:
            self._requests.take(prompts)

    def wait_for_prompts(self, prompts: int) -> float:
        """Seconds until a request that has entered may have so many prompts more."""
        return 0.0 if self._requests is None else self._requests.wait_for(prompts)

    def take_prompts(self, prompts: int) -> None:
        """Count so many prompts more; fewer than none were counted and are not to be."""
        if self._requests is not None:
            self._requests.take(prompts)

    @property
    def most_tokens(self) -> float:
        """Of one request, as of its prompts."""
        per_minute = self.limits.tokens_per_minute
        return math.inf if per_minute is None else max(1.0, per_minute)

    def wait_for_tokens(self, tokens: int) -> float:
        """Seconds until a request that has entered may take so many tokens."""
        return 0.0 if self._tokens is None else self._tokens.wait_for(tokens)

    def reserve(self, tokens: int) -> None:
        """Count tokens that a request which has entered may take; `leave` gives back those that it did not."""
        if self._tokens is not None:
            self._tokens.take(tokens)

    def leave(self, tokens: int, reserved: int = 0) -> None:
        """A request is over, which took so many tokens; `reserved` of them, or more, were counted before."""
        self.running -= 1
        if self._tokens is not None:
            self._tokens.take(tokens - reserved)


class Keys:
    """All keys of a server. Without any, everybody is `NOBODY`."""

    def __init__(self, given: Sequence[str] = (), stored: dict[str, StoredKey] | None = None) -> None:
        self._clients: list[tuple[bytes, Client]] = []
        for number, key in enumerate(given, 1):
            if len(key) < _MIN_KEY or not re.fullmatch(r"[!-~]+", key):
                raise UsageError(
                    "this is no key",
                    value="*" * len(key),
                    allowed=f"{_MIN_KEY} or more printable characters without spaces",
                    fix='python -c "import secrets; print(secrets.token_urlsafe(24))" makes one',
                )
            name = "key" if len(given) == 1 else f"key-{number}"
            digest = hashlib.sha256(key.encode())
            self._clients.append((digest.digest(), Client(name, KeyLimits(), owner=digest.hexdigest())))
        for name, entry in (stored or {}).items():
            self._clients.append((bytes.fromhex(entry.sha256), Client(name, entry, owner=entry.sha256)))
        for _, client in self._clients:
            client.shares = len(self._clients) > 1
        self._check_different()
        self._nobody = Client(NOBODY, KeyLimits())

    def _check_different(self) -> None:
        """A key twice would have the limits of one entry only; what goes by a name must be one key's."""
        by_owner: dict[str, str] = {}
        for _, client in self._clients:
            if client.owner in by_owner:
                names = f"{by_owner[client.owner]}, {client.name}"
                raise UsageError("two keys are the same", value=names, fix="leave one of them out")
            if client.name in by_owner.values():
                raise UsageError("two keys have the same name", value=client.name, fix="rename it in --api-keys FILE")
            by_owner[client.owner] = client.name

    @property
    def needed(self) -> bool:
        return bool(self._clients)

    def find(self, headers: dict[bytes, bytes]) -> Client | None:
        """Who sends these headers; None when it is nobody who may.

        A key comes as `Authorization: Bearer KEY`, as the password of `Basic` (browsers ask for it by themselves), or
        as Anthropic's `x-api-key`. All hashes are compared, in constant time each.
        """
        if not self._clients:
            return self._nobody
        key = key_in(headers)
        digest = hashlib.sha256(key).digest()
        found = None
        for stored, client in self._clients:
            if hmac.compare_digest(stored, digest):
                found = client
        return found if key else None


def key_in(headers: dict[bytes, bytes]) -> bytes:
    """The key that a request carries, right or wrong; empty when it has none."""
    kind, _, value = headers.get(b"authorization", b"").partition(b" ")
    if kind.lower() == b"bearer":
        return value.strip()
    if kind.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return headers.get(b"x-api-key", b"")


def read_keys(path: Path) -> dict[str, StoredKey]:
    """A file {"name": {"sha256": "…", "concurrent": 4, …}, …}. Raises UsageError or FileFormatError."""
    entries = read_json_object(path)
    found = {}
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise UsageError(f"{path}: {name} is no key", value=entry, allowed='{"sha256": "…"}')
        found[name] = parse_config(StoredKey, entry, f"{path}: {name}")
        if found[name].sha256 == _OF_NOTHING:
            raise UsageError(f"{path}: {name} is the hash of an empty key", fix="printf %s KEY | sha256sum")
    if not found:
        raise UsageError(f"{path} has no keys", allowed='{"name": {"sha256": "…"}}')
    return found
