"""What a server may do: where it listens, for whom, and the bounds that no request can move."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from herd.config import Config

MiB = 1 << 20


def _host(name: str) -> str:
    """As requests are compared with it: a name or an address, without a port. Raises ValueError."""
    plain = name.lower().rstrip(".")
    try:
        return str(ipaddress.ip_address(plain.strip("[]")))
    except ValueError:
        if not plain or urlsplit(f"//{plain}").hostname != plain:  # a port, a path, or whatever else
            raise ValueError("a name or an address alone, without a scheme and a port") from None
    return plain


_DEFAULT_PORTS = {"http": 80, "https": 443}


def _origin(url: str) -> str:
    """As browsers write it: a scheme, a name, and a port unless it is the scheme's own. Raises ValueError."""
    parts = urlsplit(url.lower())
    if url.lower().rstrip("/") != f"{parts.scheme}://{parts.netloc}" or "@" in url or parts.hostname is None:
        raise ValueError("http://NAME or https://NAME, without a path")
    if parts.scheme not in _DEFAULT_PORTS:
        raise ValueError("http://NAME or https://NAME, with a port if it is another than usual")
    name = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{name}" + ("" if parts.port in (None, _DEFAULT_PORTS[parts.scheme]) else f":{parts.port}")


Host = Annotated[str, AfterValidator(_host)]
Origin = Annotated[str, AfterValidator(_origin)]


class ServeConfig(Config):
    """`herd serve`'s options, one field each."""

    host: str = Field(default="127.0.0.1", description="Address to listen on. Others than this machine's need a key.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    insecure: bool = Field(default=False, description="Let others reach this server without asking for a key.")
    allow_hosts: tuple[Host, ...] = Field(default=(), description="Further names that this server goes by.")
    allow_origins: tuple[Origin, ...] = Field(
        default=(), description="Web pages of other servers that may use this one."
    )

    log_requests: bool = Field(default=False, description="Write a line to the log for each request.")

    max_body_bytes: int = Field(default=8 * MiB, ge=1024, le=1024 * MiB, description="Of a request; more is refused.")
    max_json_depth: int = Field(default=64, ge=4, le=256, description="Lists and objects inside each other.")
    body_timeout: float = Field(default=30.0, gt=0, le=3600, description="Seconds in which a request must arrive.")
    write_timeout: float = Field(
        default=60.0, gt=0, le=3600, description="Seconds a client may read nothing it is sent."
    )
    ping_seconds: float = Field(default=15.0, gt=0, le=3600, description="Silence after which a stream says it lives.")

    max_queue: int = Field(default=256, ge=0, le=100_000, description="Requests that may wait, over all keys.")
    max_running: int = Field(default=64, ge=1, le=256, description="Answers that are generated together.")
    max_n: int = Field(default=16, ge=1, le=128, description="Answers to one request.")
    max_wait: float | None = Field(
        default=None,
        gt=0,
        le=86_400,
        description="Seconds that a request may wait for its turn; one that would wait longer is refused at once. "
        "None: as long as it takes.",
    )
    deadline: float = Field(default=600.0, gt=0, le=86_400, description="Seconds after which a request is given up.")
    grace: float = Field(default=30.0, ge=0, le=3600, description="Seconds that running answers have at the end.")
    memory: int | None = Field(
        default=None,
        ge=0,
        description="Bytes that weights, caches and working space of all models may take; the one used longest ago "
        "makes way. None: what is free.",
    )
    share_beginnings: bool = Field(
        default=False,
        description="Let one key's prompts begin from what was computed for another's, who may learn of it so.",
    )
    store: Path | None = Field(default=None, description="SQLite file that keeps responses. None: nothing is kept.")
