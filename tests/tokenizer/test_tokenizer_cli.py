"""`herd tokenize`, run as a person would, and what importing the room costs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from herd.cli import main
from herd.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def saved(small_llama3: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    small_llama3.save(folder)
    return folder


class Herd:
    """The command, in this process; `run` gives exit code, standard output and standard error."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def run(self, *arguments: str | Path, stdin: bytes = b"") -> tuple[object, str, str]:
        self.monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            main(["tokenize", *map(str, arguments)])
        return ended.value.code, *self.capsys.readouterr()

    def json(self, *arguments: str | Path) -> Any:
        code, out, error = self.run(*arguments, "--json")
        assert code == 0, error
        return json.loads(out)


@pytest.fixture
def herd(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Herd:
    return Herd(capsys, monkeypatch)


def test_text_as_json_and_for_people(herd: Herd, saved: Path, small_llama3: Tokenizer, tmp_path: Path) -> None:
    text = "def f(x): 🦙"
    ids = small_llama3.encode(text)
    data = herd.json(saved, text)
    assert data["ids"] == ids and data["bytes"] == len(text.encode()) and data["vocab_size"] == 1000
    assert len(data["tokens"]) == len(ids) and data["tokens"][0] == small_llama3.token_bytes(ids[0]).decode()
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    assert herd.json(saved, "--file", tmp_path / "text.txt")["ids"] == ids
    lines = herd.run(saved, "-", stdin=text.encode())[1].splitlines()
    assert [int(line.split()[0]) for line in lines[:-1]] == ids
    assert lines[-1].startswith(f"{len(ids)} tokens, {len(text.encode())} bytes")


def test_dialogue(herd: Herd, saved: Path, small_llama3: Tokenizer, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    file = tmp_path / "dialog.json"
    file.write_text(json.dumps(messages))
    data = herd.json(saved, "--dialog", file)
    expected = small_llama3.encode_dialog(messages)
    assert (data["ids"], data["supervised"], data["chat_format"]) == (expected.ids, expected.supervised, "llama3.1")
    shown = herd.run(saved, "--dialog", file)[1].splitlines()
    assert sum(line.startswith("+ ") for line in shown) == sum(expected.supervised)
    file.write_text(json.dumps({"messages": messages[:1], "tools": ["code_interpreter"]}))
    data = herd.json(saved, "--dialog", file, "--chat-format", "llama3.2")
    expected = small_llama3.with_chat_format("llama3.2").encode_dialog(messages[:1], ["code_interpreter"], True)
    assert data["ids"] == expected.ids


def test_mistakes_are_told_in_one_line(herd: Herd, saved: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"messages": "x"}')
    for arguments, code, words in (
        ((saved,), 2, "give one thing to tokenize"),
        ((saved, "x", "--file", wrong), 2, "TEXT, --file"),
        ((saved, "--dialog", wrong), 2, "at least one message"),
        ((saved, "--file", tmp_path / "none"), 2, "cannot read the file"),
        ((wrong, "x"), 3, "not a Llama's"),
    ):
        ended, out, error = herd.run(*arguments)
        assert ended == code and words in error, error
        assert "Traceback" not in error and out == ""


def test_importing_the_room_is_light() -> None:
    """No torch, and no tokenizer library before a tokenizer is used."""
    program = (
        "import sys, herd.tokenizer;"
        "heavy = {'torch', 'tiktoken', 'sentencepiece', 'tokenizers', 'numpy', 'transformers'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
