"""`herd pull`: get a repository from the Hugging Face hub, resumed after any interruption and checked by its hash.

The hub's own library (extra "hub") answers what is in a repository and whether the user may have it. The bytes are
fetched here, because that library starts a file anew when a process was stopped: a partial file stays beside its
target and the next attempt asks for the rest with a Range request. Every file is compared with the hash that the hub
announced for it: SHA-256 of large files, git's SHA-1 of small ones.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import IO, Any, NoReturn, TypeVar

from herd.checkpoint.locate import models_home
from herd.errors import HerdError, MissingDependency, ResourceError, UsageError
from herd.files import read_json_object, write_json
from herd.progress import track

__all__ = ["pull"]

T = TypeVar("T")

DEFAULT_ENDPOINT = "https://huggingface.co"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", re.ASCII)
_FILE = re.compile(r"[\w\-][\w.\-+ ]*(/[\w\-][\w.\-+ ]*)*", re.ASCII)
_SMALL = (".json", ".model", ".jinja", ".txt", ".md")
_CHUNK = 1 << 20
_TIMEOUT = 30  # seconds without a byte
_ATTEMPTS = 5  # in a row without progress


@dataclass(frozen=True)
class _Remote:
    """One file of a repository at a fixed revision."""

    name: str
    url: str
    size: int
    etag: str  # hexadecimal: SHA-256 (64 digits) or git's SHA-1 of a blob (40)


def pull(
    repository: str,
    file: str | None = None,
    *,
    revision: str = "main",
    endpoint: str | None = None,
    token: str | None = None,
) -> Path:
    """Download a model and return its path: the repository's directory, or the one `file` asked for.

    Without `file` this gets what Herd reads: safetensors (or Meta's .pth, or a single GGUF) with configuration and
    tokenizer. `endpoint` defaults to $HF_ENDPOINT or the public hub, `token` to the user's login. A second call gets
    only what is missing or has changed. Raises HerdError with the licence page for gated repositories, for files whose
    hash is wrong, and for networks that fail; ResourceError when the disk is too small.
    """
    if not _REPOSITORY.fullmatch(repository) or ".." in repository:
        raise UsageError("not a repository's name", value=repository, allowed="OWNER/NAME")
    endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    hub = _Hub(repository, revision, endpoint, token)
    commit, listing = hub.listing()
    names = [_only(file, listing, repository)] if file is not None else _wanted(listing, repository)
    home = models_home() / repository
    manifest = _Manifest(home / "herd-pull.json", repository, commit)
    files = [hub.describe(name, commit) for name in names]
    missing = [remote for remote in files if not manifest.has(remote, home / remote.name)]
    _check_space(home, missing)
    for remote in missing:
        _fetch(remote, home / remote.name, hub)
        manifest.add(remote)
    return home / file if file is not None else home


class _Hub:
    """Questions to the hub, with its library's errors turned into ours."""

    def __init__(self, repository: str, revision: str, endpoint: str, token: str | None) -> None:
        try:
            import huggingface_hub
            import huggingface_hub.errors
        except ImportError:
            raise MissingDependency("huggingface_hub", extra="hub") from None
        self._library = huggingface_hub
        self.repository, self.revision, self.endpoint = repository, revision, endpoint
        self.token = token or huggingface_hub.get_token()

    def listing(self) -> tuple[str, list[str]]:
        """The revision's commit and the names of its files."""
        api = self._library.HfApi(endpoint=self.endpoint, token=self.token)
        info = self._ask(lambda: api.model_info(self.repository, revision=self.revision))
        return str(info.sha), [str(sibling.rfilename) for sibling in info.siblings or []]

    def describe(self, name: str, commit: str) -> _Remote:
        """Size, hash and location of a file."""
        if not _FILE.fullmatch(name) or ".." in PurePosixPath(name).parts:
            raise HerdError(
                "the repository has a file name that is not written here",
                value=name,
                allowed="letters, digits and ._-+ in folders inside it",
            )
        url = self._library.hf_hub_url(self.repository, name, revision=commit, endpoint=self.endpoint)
        data = self._ask(lambda: self._library.get_hf_file_metadata(url, token=self.token or False))
        etag = str(data.etag or "")
        if data.size is None or not re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", etag):
            raise HerdError("the hub announces no size or hash for this file", value=name)
        return _Remote(name, str(data.location), int(data.size), etag)

    def denied(self) -> NoReturn:
        """The repository is there, but this user may not have it (yet)."""
        page = f"{self.endpoint}/{self.repository}"
        login = "" if self.token else ", then log in with `hf auth login` or set HF_TOKEN"
        raise HerdError(
            "this repository is gated: its owner gives access after you accept the licence",
            value=self.repository,
            fix=f"accept the licence at {page}{login}",
        )

    def _ask(self, question: Callable[[], T]) -> T:
        errors = self._library.errors
        try:
            return question()
        except errors.GatedRepoError:
            self.denied()
        except errors.RepositoryNotFoundError:
            fix = "check the name" if self.token else "check the name; for a private one, set HF_TOKEN"
            raise HerdError("there is no such repository on the hub", value=self.repository, fix=fix) from None
        except errors.RevisionNotFoundError:
            raise HerdError("the repository has no such revision", value=self.revision) from None
        except errors.HfHubHTTPError as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403):
                self.denied()
            raise HerdError("the hub refused", value=f"HTTP {status}", fix="try again later") from None
        except Exception as error:  # the HTTP library below it changed between versions, and so did its exceptions
            raise HerdError(
                f"the hub cannot be reached at {self.endpoint}",
                value=f"{type(error).__name__}: {error}",
                fix="check the network, or set HF_ENDPOINT",
            ) from None


class _Manifest:
    """What was pulled, beside it: a file counts as present when its size and announced hash are the recorded ones."""

    def __init__(self, path: Path, repository: str, commit: str) -> None:
        self._path = path
        known = read_json_object(path).get("files") if path.exists() else None
        files = known if isinstance(known, dict) else {}
        self._data: dict[str, Any] = {"repository": repository, "revision": commit, "files": files}

    def has(self, remote: _Remote, path: Path) -> bool:
        record = self._data["files"].get(remote.name)
        return record == _record(remote) and path.is_file() and path.stat().st_size == remote.size

    def add(self, remote: _Remote) -> None:
        self._data["files"][remote.name] = _record(remote)
        write_json(self._path, self._data)


def _record(remote: _Remote) -> dict[str, Any]:
    return {"size": remote.size, "hash": remote.etag}


def _wanted(listing: list[str], repository: str) -> list[str]:
    """The files to get when none is named: one set of weights, and what belongs to it."""
    top = [name for name in listing if "/" not in name]
    weights = [name for name in top if name.endswith(".safetensors")]
    if not weights and "params.json" in top:
        weights = [name for name in top if re.fullmatch(r"consolidated(\.\d\d)?\.pth", name)]
    if not weights:
        weights = [name for name in listing if name.endswith(".gguf")]
        if len(weights) > 1:
            fix = f"herd pull {repository} FILE"
            raise UsageError("this repository has several GGUF files", allowed=", ".join(sorted(weights)), fix=fix)
    if not weights:
        raise HerdError("this repository has no weights that Herd reads", value=repository, allowed="safetensors, GGUF")
    small = [name for name in top if name.endswith(_SMALL) or name.upper().startswith(("LICENSE", "USE_POLICY"))]
    return [*small, *weights]


def _only(file: str, listing: list[str], repository: str) -> str:
    if file in listing:
        return file
    near = difflib.get_close_matches(file, listing, n=4, cutoff=0.3)
    raise HerdError(f"{repository} has no such file", value=file, allowed=f"near names: {', '.join(near)}")


def _check_space(home: Path, files: list[_Remote]) -> None:
    home.mkdir(parents=True, exist_ok=True)
    needed, free = sum(remote.size for remote in files), shutil.disk_usage(home).free
    if needed > free:
        raise ResourceError(
            f"the files need {needed / 1e9:.1f} GB, the disk at {home} has {free / 1e9:.1f} GB",
            fix="free some space, or set HERD_HOME to a larger disk",
        )


def _fetch(remote: _Remote, path: Path, hub: _Hub) -> None:
    """Download one file: into a partial neighbour named after its hash, verified, flushed, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{remote.etag[:16]}.part")
    part.touch()
    failures = 0
    while True:
        before = part.stat().st_size
        if before > remote.size:
            os.truncate(part, 0)
            before = 0
        if before == remote.size:
            break
        try:
            with part.open("ab") as out:
                _append(remote, out, before, hub)
        except (OSError, HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError):
                _refused(error, remote, hub)
            failures = 0 if part.stat().st_size > before else failures + 1
            if failures == _ATTEMPTS:
                raise HerdError(
                    f"the download of {remote.name} keeps failing ({error})",
                    value=f"{part.stat().st_size:,} of {remote.size:,} bytes are kept",
                    fix="run the same command again; it goes on where it stopped",
                ) from None
            time.sleep(min(2.0**failures - 1, 10))
    if (found := _hash(part, remote)) != remote.etag:
        part.unlink()
        raise HerdError(
            f"{remote.name} arrived damaged and was deleted", value=found, allowed=remote.etag, fix="pull again"
        )
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def _append(remote: _Remote, out: IO[bytes], start: int, hub: _Hub) -> None:
    """Ask for the bytes from `start` on and append them; a server that sends everything is obeyed from the start."""
    url = urllib.parse.urlsplit(remote.url)
    home = urllib.parse.urlsplit(hub.endpoint)
    if url.scheme not in ("https", home.scheme) or url.scheme not in ("https", "http"):
        raise HerdError("the hub points to an address that is not fetched", value=remote.url)
    request = urllib.request.Request(remote.url, headers={"Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    if hub.token and url.netloc == home.netloc:  # a content server must not see the user's token
        request.add_unredirected_header("Authorization", f"Bearer {hub.token}")
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        if start and response.status != 206:
            out.truncate(0)
            start = 0
        total = -(-(remote.size - start) // _CHUNK)
        for chunk in track(_chunks(response, remote.size - start), total=total, label=remote.name):
            out.write(chunk)


def _chunks(response: HTTPResponse, expected: int) -> Iterator[bytes]:
    """The body, never more than was announced. An early end is a ConnectionError, to be resumed."""
    left = expected
    while left:
        chunk = response.read(min(_CHUNK, left))
        if not chunk:
            raise ConnectionError(f"the connection ended {left:,} bytes early")
        left -= len(chunk)
        yield chunk


def _refused(error: urllib.error.HTTPError, remote: _Remote, hub: _Hub) -> None:
    """Give up at once on answers that another attempt cannot change."""
    if error.code in (401, 403):
        hub.denied()
    if 400 <= error.code < 500 and error.code not in (408, 416, 429):
        raise HerdError(f"the hub refused {remote.name}", value=f"HTTP {error.code}") from None


def _hash(path: Path, remote: _Remote) -> str:
    if len(remote.etag) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(f"blob {remote.size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        total = -(-remote.size // _CHUNK)
        for chunk in track(iter(lambda: file.read(_CHUNK), b""), total=total, label=f"checking {remote.name}"):
            digest.update(chunk)
    return digest.hexdigest()
