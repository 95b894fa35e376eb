"""Tables of measurements, as JSON lines or CSV with a heading, into rows of checked numbers."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from herd.errors import FileFormatError, UsageError
from herd.files import MAX_JSON_FILE, parse_json


@dataclass(frozen=True)
class Column:
    """A column of numbers in [low, high]. One that is not `needed` may be absent, empty or null."""

    name: str
    low: float
    high: float
    needed: bool = True


def read_table(path: str | Path, columns: Sequence[Column]) -> list[dict[str, float | None]]:
    """The columns of every row; others (names, notes) are left alone.

    The suffix tells the format: .jsonl, an object a line, or .csv, whose first line names the columns. Raises
    UsageError for another suffix, FileFormatError with line and field for what cannot be read.
    """
    return [row for _, row in read_numbered(path, columns)]


def read_numbered(path: str | Path, columns: Sequence[Column]) -> list[tuple[int, dict[str, float | None]]]:
    """The same, each row with the number of its line."""
    file = Path(path)
    return [
        (line, {column.name: _number(values, column, file, line) for column in columns}) for line, values in _rows(file)
    ]


def column_names(path: str | Path) -> list[str]:
    """The names of all columns that any row has, in the order in which they are first met."""
    return list(dict.fromkeys(name for _, values in _rows(Path(path)) for name in values))


def _rows(file: Path) -> list[tuple[int, Mapping[str, Any]]]:
    readers = {".jsonl": _json_lines, ".csv": _csv_lines}
    if file.suffix.lower() not in readers:
        raise UsageError("this is no table of runs", value=file, allowed="a file named *.jsonl or *.csv")
    rows = list(readers[file.suffix.lower()](_text(file), file))
    if not rows:
        raise FileFormatError("has no rows", file=file)
    return rows


def _text(file: Path) -> str:
    try:
        if not file.is_file():
            raise FileFormatError("no such file", file=file)
        if file.stat().st_size > MAX_JSON_FILE:
            raise FileFormatError("is far too large for a table of runs", file=file, value=file.stat().st_size)
        return file.read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark in front
    except OSError as error:
        raise FileFormatError(f"cannot be read ({error.strerror})", file=file) from None
    except UnicodeDecodeError as error:
        raise FileFormatError("is not UTF-8 text", file=file, offset=error.start) from None


def _json_lines(text: str, file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                values = parse_json(line.encode(), file)
            except FileFormatError as error:
                raise error.inside(f"line {number}") from None
            if not isinstance(values, dict):
                raise FileFormatError(
                    "must be a JSON object", file=file, field=f"line {number}", value=type(values).__name__
                )
            yield number, values


def _csv_lines(text: str, file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        heading = [name.strip() for name in next(reader, [])]
        if len(set(heading)) != len(heading):
            raise FileFormatError("a column appears twice", file=file, field="line 1", value=",".join(heading))
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(heading):
                raise FileFormatError(
                    "has another number of cells than the heading",
                    file=file,
                    field=f"line {reader.line_num}",
                    value=len(cells),
                    allowed=str(len(heading)),
                )
            yield reader.line_num, dict(zip(heading, (cell.strip() for cell in cells), strict=True))
    except csv.Error as error:
        raise FileFormatError(f"is not valid CSV ({error})", file=file, field=f"line {reader.line_num}") from None


def _number(values: Mapping[str, Any], column: Column, file: Path, line: int) -> float | None:
    value = values.get(column.name)
    where = f"line {line}, {column.name}"
    if value is None or value == "":
        if column.needed:
            raise FileFormatError("is not given", file=file, field=where, allowed=f"a number, as {column.low:g}")
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not column.low <= number <= column.high:
        allowed = f"a number from {column.low:g} to {column.high:g}"
        raise FileFormatError("is not valid", file=file, field=where, value=value, allowed=allowed)
    return number
