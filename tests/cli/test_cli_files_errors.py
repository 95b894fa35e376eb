"""Atomic files and messages: the habits every room relies on."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path

import pytest
from pydantic import Field

from herd import FileFormatError, HerdError, UsageError
from herd.config import Config, parse_config
from herd.files import atomic_dir, atomic_write, read_json, read_json_object, sha256_file, write_json


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


def test_a_directory_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of the two renames fails, when the old directory is already out of the way."""
    target = tmp_path / "d"
    with atomic_dir(target) as folder:
        (folder / "old").write_text("old")
    rename = os.replace

    def fail_for_the_new(source: Path, destination: Path) -> None:
        if Path(source).suffix == ".part":
            raise OSError(5, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr("os.replace", fail_for_the_new)
    with pytest.raises(OSError, match="Input/output"), atomic_dir(target) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert (target / "old").read_text() == "old"


def test_json_of_others_is_strict_and_ours_may_say_infinity(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"loss": math.inf, "seed": 2**128})
    assert read_json(path) == {"loss": math.inf, "seed": 2**128}
    with pytest.raises(FileFormatError, match="not a JSON number; got Infinity"):
        read_json_object(path)
    path.write_text("[]")
    with pytest.raises(FileFormatError, match="must be a JSON object; got list"):
        read_json_object(path)
    for read in (read_json, read_json_object):
        path.write_text('{"a": ' + "9" * 5000 + "}")
        with pytest.raises(FileFormatError, match="endless number"):
            read(path)
        with pytest.raises(FileFormatError, match="no such file"):
            read(tmp_path)
        path.write_bytes(b'{"\xff": 1}')
        with pytest.raises(FileFormatError, match="not UTF-8") as caught:
            read(path)
        assert caught.value.offset == 2


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
    assert "got a/b" in str(HerdError("no file", value=Path("a/b")))
