"""Atomic files and messages: the habits every room relies on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from pydantic import Field

from herd import FileFormatError, HerdError, UsageError
from herd.config import Config, parse_config
from herd.files import atomic_dir, atomic_write, read_json, sha256_file, write_json


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(target, "w") as file:
        file.write("new")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_good_write_replaces(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.bin"
    with atomic_write(target) as file:
        file.write(b"\x00\r\n")
    assert target.read_bytes() == b"\x00\r\n"
    assert sha256_file(target) == hashlib.sha256(b"\x00\r\n").hexdigest()


def test_atomic_dir_replaces_whole_directories(tmp_path: Path) -> None:
    target = tmp_path / "d"
    for name in ("one", "two"):
        with atomic_dir(target) as folder:
            (folder / name).write_text(name)
    assert [p.name for p in target.iterdir()] == ["two"]
    with pytest.raises(RuntimeError), atomic_dir(target):
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize(
    ("text", "message"), [('{"a": 1, "a": 2}', "twice"), ("{", "not valid JSON"), ("[" * 100_000, "nested")]
)
def test_broken_json_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=message) as caught:
        read_json(path)
    assert "x.json" in str(caught.value)


def test_json_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": [1, "é"], "a": None})
    assert read_json(tmp_path / "x.json") == {"a": None, "b": [1, "é"]}


class Example(Config):
    steps: int = Field(10, ge=1, description="number of steps")


class Outer(Config):
    inner: Example | None = Field(None, description="a nested model")


def test_advice_comes_from_the_nested_model() -> None:
    with pytest.raises(UsageError, match=r"'inner\.stpes'.*did you mean 'steps'"):
        parse_config(Outer, {"inner": {"stpes": 1}}, "x.yaml")


def test_config_errors_are_advice() -> None:
    with pytest.raises(UsageError, match="did you mean 'steps'"):
        parse_config(Example, {"stesp": 3}, "x.yaml: base")
    with pytest.raises(UsageError, match=r"x\.yaml: base: field 'steps'.*got 0.*greater than or equal to 1"):
        parse_config(Example, {"steps": 0}, "x.yaml: base")
    assert parse_config(Example, {"steps": 3}, "").steps == 3


def test_messages_quote_control_characters_and_stay_short() -> None:
    message = str(HerdError("bad name", value="\x1b[31m" + "x" * 500, allowed="letters", fix="herd list"))
    assert "\x1b" not in message and len(message) < 300
    assert "allowed: letters" in message and "to fix: herd list" in message
