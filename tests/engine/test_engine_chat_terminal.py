"""`herd chat` in a real terminal (a pty) and in a pipe, with a real tiny model."""

from __future__ import annotations

import codecs
import dataclasses
import inspect
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from herd import LLM
from herd.cli import main
from herd.cli.chat import _Terminal
from herd.cli.options import Choosing, Loading
from herd.cli.output import visible
from herd.engine import Chunk, Sampling
from herd.engine.backend import thread_count

pytest.importorskip("torch")

COMMAND = [sys.executable, "-c", "from herd.cli import main; main()"]
PROMPT = "› "


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Path:
    """A model that never ends an answer by itself, with room for long ones."""
    return make_model(context_length=20_000, talkative=True)


@pytest.fixture(scope="module")
def small(make_model: Callable[..., Path]) -> Path:
    return make_model(context_length=96, talkative=True)


class Terminal:
    """A child process whose terminal we are."""

    def __init__(self, *arguments: str) -> None:
        self.seen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "PYTHONUTF8": "1"}
            os.execve(sys.executable, [*COMMAND, *arguments], environment)

    def expect(self, pattern: str, timeout: float = 60.0) -> str:
        """Read until `pattern` appears; return everything before its end and forget it."""
        end = time.monotonic() + timeout
        while True:
            if found := re.search(pattern, self.seen):
                text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
                return text
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen[-500:]!r}"
            self._read(0.2)

    def send(self, text: str) -> None:
        os.write(self.handle, text.encode())

    def ctrl_c_at_the_prompt(self) -> None:
        """As a person does: not in the microseconds between the prompt and the read that a signal interrupts."""
        time.sleep(0.3)
        self.send("\x03")

    def exit_code(self) -> int:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            self._read(0.05)
        os.kill(self.pid, 9)
        raise AssertionError(f"did not leave; last seen {self.seen[-300:]!r}")

    def _read(self, timeout: float) -> None:
        if select.select([self.handle], [], [], timeout)[0]:
            try:
                self.seen = (self.seen + self._decoder.decode(os.read(self.handle, 65536))).replace("\r\n", "\n")
            except OSError:  # the child has closed its side
                time.sleep(0.01)


@pytest.fixture
def chat(model: Path) -> Iterator[Terminal]:
    terminal = Terminal("chat", str(model), "--temperature", "0", "--max-tokens", "19000")
    yield terminal
    os.close(terminal.handle)


def plain(text: str) -> str:
    """What a person can read: the terminal's line ends and control characters do not count."""
    return "".join(c for c in text if c.isprintable())


def test_a_conversation_in_a_terminal(small: Path, tmp_path: Path) -> None:
    """Answers equal the engine's, history is kept, /system, /reset, /save, /help and mistakes work, Ctrl-D leaves."""
    terminal = Terminal("chat", str(small), "--temperature", "0", "--max-tokens", "6")
    with LLM(small) as llm:
        messages = [{"role": "user", "content": "hello"}]
        first = llm.chat(messages, temperature=0, max_tokens=6).text
        messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "and?"}]
        second = llm.chat(messages, temperature=0, max_tokens=6).text
        short = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]
        kind = llm.chat(short, temperature=0, max_tokens=6).text

    terminal.expect(PROMPT)
    for question, answer in (("hello", first), ("and?", second)):
        terminal.send(question + "\n")
        shown = terminal.expect(PROMPT)
        assert plain(visible(answer)) in plain(shown)
        assert "--max-tokens" in shown
    terminal.send(f"/save {tmp_path}/talk.json\n")
    terminal.expect("saved")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["messages"] == [*messages, {"role": "assistant", "content": second}]

    terminal.send("/sistem x\n")
    terminal.expect("did you mean /system")
    terminal.send("/help\n")
    terminal.expect("/reset ")
    terminal.send(f"/save {tmp_path}/talk.json/inside-a-file.json\n")
    terminal.expect("could not write")
    terminal.send("/system Be kind.\n")
    terminal.expect("a new conversation")
    terminal.expect(PROMPT)
    terminal.send("hello\n")
    assert plain(kind) in plain(terminal.expect(PROMPT))
    terminal.send("/system\n")
    terminal.expect("Be kind.")
    terminal.expect(PROMPT)
    time.sleep(0.3)  # the prompt is seen before the line editor reads: an end of file sent in between is lost
    terminal.send("\x04")
    assert terminal.exit_code() == 0
    os.close(terminal.handle)


def test_ctrl_c_stops_the_answer_and_not_the_program(chat: Terminal, tmp_path: Path) -> None:
    chat.expect(PROMPT)
    chat.send("hello\n")
    chat.expect("hello\n")
    chat.expect(r"[^\n]{20}")
    chat.send("\x03")
    chat.expect(r"\(stopped\)")
    chat.expect(PROMPT)
    chat.send(f"/save {tmp_path}/talk.json\n")
    chat.expect("saved")
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert len(messages[1]["content"]) >= 20, "what was shown belongs to the history"
    chat.expect(PROMPT)
    chat.ctrl_c_at_the_prompt()
    chat.expect("again")
    chat.expect(PROMPT)
    chat.send("again\n")  # a message in between: the next Ctrl-C is a first one again
    chat.expect(r"again\n")
    chat.expect(r"[^\n]{20}")
    chat.send("\x03")
    chat.expect(r"\(stopped\)")
    chat.expect(PROMPT)
    chat.ctrl_c_at_the_prompt()
    chat.expect("again")
    chat.expect(PROMPT)
    chat.ctrl_c_at_the_prompt()
    assert chat.exit_code() == 130


def test_full_context_is_said_and_nothing_is_dropped(small: Path, tmp_path: Path) -> None:
    terminal = Terminal("chat", str(small), "--temperature", "0")
    terminal.expect(PROMPT)
    terminal.send("hello\n")
    assert "the context of 96 tokens is full" in terminal.expect(PROMPT)
    terminal.send("more\n")
    assert "/reset begins anew" in terminal.expect("not sent; /reset begins anew")
    terminal.expect(PROMPT)
    terminal.send(f"/save {tmp_path}/talk.json\n")
    terminal.expect("saved")
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert messages[0]["content"] == "hello" and len(messages) == 2
    terminal.expect(PROMPT)
    terminal.send("/reset\n")
    terminal.expect(PROMPT)
    terminal.send("hello\n")
    shown = plain(terminal.expect(PROMPT))
    assert plain(visible(messages[1]["content"]))[:40] in shown
    terminal.send("/exit\n")
    assert terminal.exit_code() == 0
    os.close(terminal.handle)


def test_ctrl_c_ends_a_conversation_through_a_pipe(model: Path) -> None:
    child = subprocess.Popen(
        [*COMMAND, "chat", str(model), "--max-tokens", "19000", "--temperature", "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
    )
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(b"hello\n" * 100)
    child.stdin.flush()
    assert child.stdout.read(20), "the first answer streams"
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 130 and b"Traceback" not in error, error.decode()


def test_ctrl_c_beside_an_answer_does_not_end_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    class Session:
        def say(self, text: str) -> None:
            raise KeyboardInterrupt

    terminal = _Terminal(Session(), 100, None, False)  # type: ignore[arg-type]
    terminal._person = True
    lines = iter(["hello", "/quit"])
    terminal._read = lambda: next(lines)  # type: ignore[method-assign]
    assert terminal.run("title") == 0
    assert "(stopped)" in capsys.readouterr().err


def test_ctrl_c_in_a_long_prompt_breaks_it_off(model: Path, tmp_path: Path) -> None:
    """The first press is enough, at once, and the message is not sent: no token of an answer comes."""
    long = "import os\n" * 2_700
    chat = Terminal("chat", str(model), "--system", long, "--temperature", "0", "--threads", "1")
    chat.expect(PROMPT)
    chat.send("hello\n")
    chat.expect("hello\n")
    time.sleep(0.3)
    chat.send("\x03")
    assert plain(chat.expect(r"\(stopped\)")) == "^C(stopped)"
    chat.expect(PROMPT)
    chat.send(f"/save {tmp_path}/talk.json\n")
    chat.expect("saved")
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["system"]
    chat.expect(PROMPT)
    chat.send("/quit\n")
    assert chat.exit_code() == 0
    os.close(chat.handle)


def test_ctrl_c_before_the_first_token_stops_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    class Session:
        def say(self, text: str) -> Iterator[Chunk]:
            signal.raise_signal(signal.SIGINT)  # while the prompt is computed
            yield Chunk("too late", 0)

    terminal = _Terminal(Session(), 100, None, False)  # type: ignore[arg-type]
    terminal._person = True
    lines = iter(["hello", "/quit"])
    terminal._read = lambda: next(lines)  # type: ignore[method-assign]
    assert terminal.run("title") == 0
    shown = capsys.readouterr()
    assert "(stopped)" in shown.err and shown.out == ""


def test_right_guesses_are_counted(small: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herd.progress.interactive", lambda: True)
    options = ["--temperature", "0", "--draft", "ngram", "--max-tokens", "40"]
    with LLM(small, draft="ngram") as llm:
        times = llm.generate("def f", temperature=0, max_tokens=40).timings
    assert times.drafted_tokens
    words = f"{times.accepted_tokens} of {times.drafted_tokens} guesses right"
    assert words in run("generate", str(small), "def f", *options)[2]
    assert "guesses" not in run("generate", str(small), "def f", *options[:2])[2]
    terminal = Terminal("chat", str(small), *options)
    terminal.expect(PROMPT)
    terminal.send("hello\n")
    terminal.expect(PROMPT)
    terminal.send("/quit\n")
    terminal.expect(r"\d+ of \d+ guesses right")
    assert terminal.exit_code() == 0
    os.close(terminal.handle)


def test_an_answer_that_cannot_fit_names_the_option(small: Path) -> None:
    result = subprocess.run(
        [*COMMAND, "chat", str(small), "--max-tokens", "95"],
        input=b"hello\n",
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        timeout=120,
    )
    assert result.returncode == 2 and result.stdout == b""
    assert "this message with an answer of up to 95 (--max-tokens) would make it" in result.stderr.decode()


def test_generate_takes_a_pipe_that_is_not_utf_8(small: Path) -> None:
    result = subprocess.run(
        [*COMMAND, "generate", str(small), "--max-tokens", "2", "--json"],
        input=b"caf\xe9",
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8:strict"},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr.decode()
    assert json.loads(result.stdout)["prompt"] == "caf\ufffd"


def test_chat_through_a_pipe(small: Path) -> None:
    options = ["--temperature", "0", "--max-tokens", "5", "--json"]
    result = subprocess.run(
        [*COMMAND, "chat", str(small), *options],
        input=b"hello\n\nand?\n/reset\nhello\n\xff\xfe\n/quit\nnever\n",
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr.decode()
    lines = [json.loads(line) for line in result.stdout.decode().splitlines()]
    assert len(lines) == 4 and lines[0] == lines[2] and lines[0] != lines[1]
    with LLM(small) as llm:
        answer = llm.chat([{"role": "user", "content": "hello"}], temperature=0, max_tokens=5)
    assert lines[0] == {"role": "assistant", "content": answer.text, "finish_reason": answer.finish_reason}


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in this process: (exit code, standard output, standard error)."""

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        output = capsys.readouterr()
        return int(left.value.code or 0), output.out, output.err

    return run


def test_a_message_without_an_answer_shows_in_a_pipe(small: Path, run: Run) -> None:
    """Answers and questions can still be paired, and the exit code says that something was not answered."""
    code, out, err = run("chat", str(small), "--max-tokens", "5", "--json", stdin="hello\n" + "x " * 300 + "\nhello\n")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["role"] for line in lines] == ["assistant", "error", "assistant"]
    assert "was not sent" in lines[1]["content"] and "was not sent" in err and code == 2


def test_generate_command(small: Path, run: Run) -> None:
    with LLM(small) as llm:
        expected = llm.generate("def f", temperature=0, max_tokens=9)
    options = ["--temperature", "0", "--max-tokens", "9"]
    assert run("generate", str(small), "def f", *options) == (0, expected.text + "\n", "")
    assert run("generate", str(small), *options, stdin="def f") == (0, expected.text + "\n", "")
    code, out, _ = run("generate", str(small), "def f", *options, "--json")
    data = json.loads(out)
    assert code == 0 and (data["text"], data["token_ids"]) == (expected.text, expected.token_ids)
    assert data["usage"]["completion_tokens"] == 9 and data["finish_reason"] == "length"
    stop = expected.text[3:5]
    code, out, _ = run("generate", str(small), "def f", *options, "--stop", stop)
    assert code == 0 and out == expected.text[: expected.text.index(stop)] + "\n"


@pytest.mark.parametrize("text", ["x ", "def f  ", "x\n", " ", ""])
def test_a_text_is_continued_as_it_is(small: Path, run: Run, text: str) -> None:
    """Spaces and line breaks at its end too; a pipe's last line break is not the text's."""
    options = ["--temperature", "0", "--max-tokens", "6"]
    with LLM(small) as llm:
        expected = llm.generate(text, temperature=0, max_tokens=6)
    assert run("generate", str(small), text, *options) == (0, expected.text + "\n", "")
    data = json.loads(run("generate", str(small), *options, "--json", stdin=text + "\n")[1])
    assert (data["prompt"], data["token_ids"]) == (text, expected.token_ids)


def test_several_continuations_stand_under_headings(small: Path, run: Run) -> None:
    """Headings are for people, on standard error: texts are the same with and without, and JSON has none."""
    options = ["--max-tokens", "6", "--temperature", "1.5", "--seed", "3", "--n", "3"]
    with LLM(small) as llm:
        texts = [each.text for each in llm.generate("x", n=3, max_tokens=6, temperature=1.5, seed=3)]
    headings = "".join(f"── {i} of 3 ──\n" for i in (1, 2, 3))
    assert run("generate", str(small), "x", *options) == (0, "".join(text + "\n" for text in texts), headings)
    code, out, err = run("generate", str(small), "x", *options, "--json")
    assert (code, err) == (0, "") and [each["text"] for each in json.loads(out)["completions"]] == texts
    together = subprocess.run(
        [*COMMAND, "generate", str(small), "x", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        timeout=120,
    )
    shown = "".join(f"── {i} of 3 ──\n{text}\n" for i, text in enumerate(texts, 1))
    assert together.stdout.decode() == shown, "on one terminal each text is under its heading"


def test_the_common_options_are_those_of_the_engine() -> None:
    """By name and by default; what is a mapping or a list there is said in words here."""
    engine = {name: p.default for name, p in inspect.signature(LLM).parameters.items()}
    ours = {field.name: field.default for field in dataclasses.fields(Loading)}
    assert {**ours, "cpus": ()} == {name: engine[name] for name in ours}
    sampling = {field.name: field.default for field in dataclasses.fields(Sampling)}
    ours = {field.name: field.default for field in dataclasses.fields(Choosing)}
    assert {**ours, "stop": ()} == {name: sampling[name] for name in ours}


def test_generate_takes_the_engines_options(small: Path, tmp_path: Path, run: Run) -> None:
    """Each option says on the command line what it says in Python; the JSON has what it gives."""
    with LLM(small, threads=1) as llm:
        sampled = dict(max_tokens=6, temperature=1.5, seed=3, typical_p=0.9, presence_penalty=0.5)
        several = llm.generate("def f", n=2, ignore_eos=True, top_logprobs=2, frequency_penalty=0.5, **sampled)
        first = llm.generate("def f", temperature=0, max_tokens=4).token_ids[0]
        biased = llm.generate("def f", temperature=0, max_tokens=4, logit_bias={first: -100.0, 5: 1.5})
    options = ["--max-tokens", "6", "--temperature", "1.5", "--seed", "3", "--typical-p", "0.9"]
    options += ["--presence-penalty", "0.5", "--frequency-penalty", "0.5", "--ignore-eos", "--n", "2"]
    code, out, _ = run("generate", str(small), "def f", *options, "--top-logprobs", "2", "--cpus", "0", "--json")
    found = json.loads(out)["completions"]
    assert code == 0 and [each["token_ids"] for each in found] == [each.token_ids for each in several]
    assert [each["logprobs"] for each in found] == [each.logprobs for each in several]
    assert [len(top) for top in found[0]["top_logprobs"]] == [2] * 6
    assert run("generate", str(small), "def f", *options)[1] == "".join(each.text + "\n" for each in several)
    greedy = ["--temperature", "0", "--max-tokens", "4"]
    bias = ["--logit-bias", f"{first}=-100", "--logit-bias", "5=1.5", "--backend", "native"]
    assert run("generate", str(small), "def f", *greedy, *bias)[1] == biased.text + "\n"
    data = json.loads(run("generate", str(small), "def f", *greedy, "--logprobs", "--json")[1])
    assert len(data["logprobs"]) == 4 and data["top_logprobs"] is None


def test_generate_and_chat_take_an_adapter(small: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("herd._native")
    rng = np.random.default_rng(0)
    stem = "base_model.model.model.layers.0.self_attn.o_proj"
    changes = {f"{stem}.lora_{side}.weight": rng.normal(0, 1, shape).astype(np.float32) for side, shape in (
        ("A", (2, 48)), ("B", (48, 2)))}  # fmt: skip
    (tmp_path / "adapter").mkdir()
    save_file(changes, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    with LLM(small) as llm:
        llm.load_adapter(tmp_path / "adapter", "a")
        text = llm.generate("def f", temperature=0, max_tokens=6, adapter="a").text
        answer = llm.chat([{"role": "user", "content": "hello"}], temperature=0, max_tokens=6, adapter="a").text
        assert text != llm.generate("def f", temperature=0, max_tokens=6).text
    options = ["--temperature", "0", "--max-tokens", "6", "--adapter", str(tmp_path / "adapter")]
    assert run("generate", str(small), "def f", *options)[1] == text + "\n"
    assert run("chat", str(small), *options, stdin="hello\n")[1] == answer + "\n"


def test_more_threads_than_processors_are_said(small: Path, run: Run) -> None:
    usable = thread_count(None)
    code, _, err = run("generate", str(small), "def f", "--max-tokens", "2", "--threads", "999")
    assert code == 0 and f"--threads 999 are more than the {usable} usable here" in err


def test_errors_are_one_line_and_have_their_exit_code(small: Path, run: Run) -> None:
    for code, word, arguments in (
        (2, "96", ["generate", str(small), "def f", "--max-tokens", "900"]),
        (2, "top_p", ["generate", str(small), "x", "--top-p", "2"]),
        (2, "top_p", ["chat", str(small), "--top-p", "2"]),
        (3, "no such model", ["generate", str(small) + "-not", "x"]),
        (2, "bf16", ["chat", str(small), "--quant", "q9"]),
        (2, "n is out of range", ["generate", str(small), "x", "--n", "0"]),
        (2, "add --json", ["generate", str(small), "x", "--logprobs"]),
        (2, "ID=VALUE", ["generate", str(small), "x", "--logit-bias", "5:1"]),
        (2, "logit_bias", ["generate", str(small), "x", "--logit-bias", "5=nan"]),
        (2, "--cpus is no list", ["generate", str(small), "x", "--cpus", "0-3"]),
        (2, "threads is out of range", ["generate", str(small), "x", "--threads", "0"]),
        (2, "auto, native, torch", ["chat", str(small), "--backend", "gpu"]),
        (3, "no such file", ["generate", str(small), "x", "--adapter", str(small) + "-not"]),
    ):
        left, out, err = run(*arguments, stdin="hello\n")
        assert (left, out) == (code, "") and word in err and "Traceback" not in err, (arguments, err)
