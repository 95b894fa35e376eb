"""Files are written once: into a temporary neighbour, flushed to disk, then renamed over the target.

A reader therefore sees the old file or the new one, never half of one, whatever happens to the writer.
JSON is read without surprises: no repeated keys, no endless numbers, errors that name the file and the place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from herd.errors import FileFormatError

MAX_JSON_FILE = 100_000_000  # bytes; configurations are kilobytes, the index of the largest Llama under a megabyte
MAX_DIGITS = 100  # of a whole number; the state of a random generator has 39


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file that replaces `path` when the block ends well and disappears when it does not.

    `mode` is "wb" or "w" (UTF-8, newlines as given).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with os.fdopen(handle, mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_directory(path.parent)


@contextlib.contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Give a temporary directory that becomes `path` when the block ends well; an existing `path` is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        sync_directory(temporary)
        if path.exists():
            _replace_directory(temporary, path)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(path.parent)


def _replace_directory(new: Path, path: Path) -> None:
    """Put `new` in the place of `path`; the old directory comes back when that fails."""
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
    os.replace(path, old / path.name)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old / path.name, path)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | Path, data: object) -> None:
    """Write `data` as readable, key-sorted JSON, atomically."""
    with atomic_write(path, "w") as file:
        json.dump(data, file, indent=2, sort_keys=True, ensure_ascii=False)
        file.write("\n")


def read_json(path: str | Path) -> Any:
    """Read one of our own JSON files, where numbers may be NaN or infinite; FileFormatError names the place."""
    return parse_json(_json_bytes(Path(path)), Path(path), finite=False)


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON file of anyone's, which must hold an object of strict JSON."""
    data = parse_json(_json_bytes(Path(path)), Path(path))
    if not isinstance(data, dict):
        raise FileFormatError("must be a JSON object", file=path, value=type(data).__name__)
    return data


def parse_json(raw: bytes, file: Path, field: str | None = None, offset: int = 0, *, finite: bool = True) -> Any:
    """Parse `raw`, which stands at byte `offset` of `file`. FileFormatError for anything that is not strict JSON.

    `finite` False allows the words NaN, Infinity and -Infinity, which are not JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise FileFormatError("a key appears twice", file=file, field=twice, offset=offset)
        return result

    def whole(digits: str) -> int:
        if len(digits) > MAX_DIGITS:  # such numbers break arithmetic and messages long after they were read
            fail("has an endless number", offset, value=digits[:20] + "…", allowed=f"up to {MAX_DIGITS} digits")
        return int(digits)

    def constant(word: str) -> float:
        if finite:
            fail("is not a JSON number", offset, value=word)
        return float(word)

    def fail(what: str, place: int, **details: Any) -> NoReturn:
        raise FileFormatError(what, file=file, field=field, offset=place, **details)

    try:
        return json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=constant, parse_int=whole)
    except UnicodeDecodeError as error:
        fail("is not UTF-8 text", offset + error.start)
    except json.JSONDecodeError as error:
        fail(f"is not valid JSON ({error.msg})", offset + len(error.doc[: error.pos].encode()))
    except RecursionError:
        fail("JSON is nested too deeply", offset)


def _json_bytes(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise FileFormatError("no such file", file=path)
        if path.stat().st_size > MAX_JSON_FILE:
            raise FileFormatError("is far too large for JSON", file=path, value=path.stat().st_size)
        return path.read_bytes()
    except OSError as error:
        raise FileFormatError(f"cannot be read ({error.strerror})", file=path) from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_directory(path: Path) -> None:
    """Make the rename itself durable; file systems that cannot are left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
