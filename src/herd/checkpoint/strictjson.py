"""JSON from untrusted files: no duplicate keys, no NaN, no surprise exceptions; errors name the file and the place."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from herd.errors import FileFormatError

__all__ = ["parse_json", "read_json_object"]

MAX_JSON_FILE = 100_000_000  # bytes; configurations are kilobytes, the index of the largest Llama under a megabyte


def parse_json(raw: bytes, file: Path, field: str, offset: int = 0) -> Any:
    """Parse `raw`, which stands at byte `offset` of `file`. FileFormatError for anything that is not strict JSON."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise FileFormatError("a key appears twice", file=file, field=twice, offset=offset)
        return result

    def refuse(constant: str) -> NoReturn:
        raise FileFormatError("is not a JSON number", file=file, field=field, offset=offset, value=constant)

    try:
        return json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise FileFormatError("is not UTF-8 text", file=file, field=field, offset=offset + error.start) from None
    except json.JSONDecodeError as error:
        place = offset + len(error.doc[: error.pos].encode())
        raise FileFormatError(f"is not valid JSON ({error.msg})", file=file, field=field, offset=place) from None
    except RecursionError:
        raise FileFormatError("JSON is nested too deeply", file=file, field=field, offset=offset) from None
    except ValueError as error:  # a number of thousands of digits
        raise FileFormatError(f"has a number Python refuses ({error})", file=file, field=field, offset=offset) from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object."""
    try:
        if not path.is_file():
            raise FileFormatError("no such file", file=path)
        if path.stat().st_size > MAX_JSON_FILE:
            raise FileFormatError("is far too large for JSON", file=path, value=path.stat().st_size)
        raw = path.read_bytes()
    except OSError as error:
        raise FileFormatError(f"cannot be read ({error.strerror})", file=path) from None
    data = parse_json(raw, path, "JSON")
    if not isinstance(data, dict):
        raise FileFormatError("must be a JSON object", file=path, value=type(data).__name__)
    return data
