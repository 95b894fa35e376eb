"""`herd chat`: talk to a model in the terminal."""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from herd.cli.options import Choosing, Loading, takes_groups
from herd.cli.output import guesses, speak

if TYPE_CHECKING:
    from herd.engine import ChatSession

_HELP = """\
  /reset        forget the conversation (the system text stays)
  /system TEXT  set the system text and forget the conversation; /system alone shows it
  /save FILE    write the conversation as JSON
  /help         this list
  /quit, /exit  leave (also Ctrl-D)
Ctrl-C stops an answer; at the prompt, twice, it leaves. A message that begins with a space is never a command."""

_LEAVE = ("/quit", "/exit")


@takes_groups
def command(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, GGUF file, run directory or pulled repository.")],
    system: Annotated[str | None, typer.Option(help="System text.")] = None,
    *,
    choosing: Choosing,
    loading: Loading,
    as_json: Annotated[bool, typer.Option("--json", help="Print each answer as one line of JSON.")] = False,
) -> int:
    """Talk to a model; answers stream as they are made. Type /help for the commands inside.

    Messages may also come through a pipe, one on each line. Then a message that got no answer makes the exit code
    that of its error, and with --json a line of its own with "role": "error".

    Examples:

        herd chat runs/pocket

        herd chat model.gguf --system "Answer briefly." --temperature 0

        echo "What is 2 + 3?" | herd chat runs/pocket
    """
    from herd.engine import LLM, ChatSession
    from herd.progress import status

    arguments = loading.arguments()
    status("loading …")
    with LLM(model, **arguments) as llm:
        status("")
        session = ChatSession(llm, system, **choosing.options(llm))
        title = f"{model} · {llm.context} tokens of context · /help for commands, Ctrl-D to leave"
        questions = _questions(Path(model).expanduser()) if sys.stdin.isatty() else []
        return _Terminal(session, llm.context, choosing.max_tokens, as_json).run("\n".join([title, *questions]))


def _questions(model: Path) -> list[str]:
    """What to ask a run's model, which knows little more than it was tuned on: some of its held-out exercises."""
    from herd.errors import FileFormatError
    from herd.files import read_json
    from herd.recipe import read_run

    try:
        entry = read_run(model)["stages"]["evaluate"]
        asked = read_json(model / entry["directory"] / "results.json")["dialogs"]
        easy = [str(dialog["question"]) for dialog in asked if dialog["difficulty"] == "easy"]
    except (FileFormatError, KeyError, TypeError):
        return []
    return [f"for example: {question}" for question in easy if question.isprintable()][:3]


class _Terminal:
    """Reads lines, shows answers, obeys commands."""

    def __init__(self, session: ChatSession, context: int, max_tokens: int | None, as_json: bool) -> None:
        self._session = session
        self._context = context
        self._max_tokens = max_tokens
        self._as_json = as_json
        self._person = sys.stdin.isatty()
        self._code = 0  # through a pipe: of the last message that got no answer
        self._guesses = self._right = 0  # of speculation, in the answers that came to their end
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/system": self._system,
            "/save": self._save,
            "/help": lambda _: self._note(_HELP),
        }

    def run(self, title: str) -> int:
        """Talk until the input ends; returns the exit code."""
        code = self._talk(title)
        if self._guesses and self._person:
            self._note(guesses(self._right, self._guesses))
        return code

    def _talk(self, title: str) -> int:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        if self._person:
            with contextlib.suppress(ImportError):  # line editing and history at the prompt, where there is one
                import readline  # noqa: F401
            self._note(title)
        interrupted = False
        while True:
            try:
                line = self._read()
            except EOFError:
                if self._person:
                    self._note("")
                return self._code
            except KeyboardInterrupt:
                if interrupted or not self._person:
                    self._note("")
                    return 130
                interrupted = True
                self._note("\nCtrl-C again or Ctrl-D leaves")
                continue
            interrupted = False
            if line.strip() in _LEAVE:
                return self._code
            try:
                if line.startswith("/"):
                    self._obey(line.strip())
                elif line.strip():
                    self._answer(line.strip())
            except KeyboardInterrupt:
                if not self._person:
                    raise
                self._note("\n(stopped)")  # before the answer's first token, or beside it: the program goes on

    def _read(self) -> str:
        if self._person:
            if sys.stdout.isatty():
                return input("\n› ")  # through input, so that line editing knows the prompt's width
            sys.stderr.write("\n› ")
            sys.stderr.flush()
            return input()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def _answer(self, text: str) -> None:
        from herd.errors import ContextLengthExceeded, HerdError

        try:
            answer = self._session.say(text)
        except ContextLengthExceeded as error:
            wanted = f" with an answer of up to {self._max_tokens} (--max-tokens)" if self._max_tokens else ""
            self._refuse(
                f"The context is full: this message{wanted} would make it {error.needed} tokens, the model has "
                f"{error.allowed_tokens}. Nothing was dropped and the message was not sent; /reset begins anew.",
                error.exit_code,
            )
            return
        except HerdError as error:
            self._refuse(str(error), error.exit_code)
            return
        parts: list[str] = []
        # Through a pipe nobody sees which answer Ctrl-C would stop: there it ends the program as usual.
        interruptible = _interruptible() if self._person else contextlib.nullcontext(lambda: False)
        with contextlib.closing(answer):
            first = next(answer)  # Ctrl-C in a long prompt breaks it off: there is nothing yet to stop after
            with interruptible as stopped:
                for chunk in itertools.chain([first], answer):
                    parts.append(chunk.text)
                    if not self._as_json:
                        speak(chunk.text)
                    if chunk.completion is not None:
                        self._guesses += chunk.completion.timings.drafted_tokens
                        self._right += chunk.completion.timings.accepted_tokens
                    if stopped():
                        break
        self._finish("".join(parts))

    def _refuse(self, why: str, code: int) -> None:
        """A message that got no answer: said to the person, and to the program that reads answers through a pipe."""
        self._note(why)
        if self._as_json:
            sys.stdout.write(json.dumps({"role": "error", "content": why}, ensure_ascii=False) + "\n")
            sys.stdout.flush()
        if not self._person:
            self._code = code

    def _finish(self, text: str) -> None:
        reason = self._session.finish_reason
        if self._as_json:
            line = {"role": "assistant", "content": text, "finish_reason": reason}
            sys.stdout.write(json.dumps(line, ensure_ascii=False))
        sys.stdout.write("\n")
        sys.stdout.flush()
        if reason == "cancelled":
            self._note("(stopped)")
        elif reason == "length":
            used = self._session.context_used
            if used >= self._context:
                self._note(f"(cut: the context of {self._context} tokens is full; /reset begins anew)")
            else:
                self._note("(cut at the most tokens an answer may have; --max-tokens raises it)")

    def _obey(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        action = self._commands.get(name)
        if action is not None:
            action(argument.strip())
            return
        near = difflib.get_close_matches(name, [*self._commands, *_LEAVE], n=1)
        self._note(f"no such command: {name}" + (f"; did you mean {near[0]}?" if near else "") + "; /help lists them")

    def _reset(self, _: str) -> None:
        self._session.reset()
        self._note("(a new conversation)")

    def _system(self, text: str) -> None:
        if not text:
            self._note(self._session.system or "(no system text)")
            return
        self._session.system = text
        self._session.reset()
        self._note("(system text set; a new conversation)")

    def _save(self, name: str) -> None:
        if not name:
            self._note("/save FILE: which file?")
            return
        try:
            self._session.save(Path(name).expanduser())
        except OSError as error:
            self._note(f"could not write {name}: {error.strerror}")
        else:
            self._note(f"(saved to {name})")

    @staticmethod
    def _note(text: str) -> None:
        """A line for the person; never mixed into the answers on standard output."""
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """While an answer streams, the first Ctrl-C asks it to stop after the present token, a second one breaks it off."""
    pressed = 0

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed > 0
    except KeyboardInterrupt:
        pass  # broken off: the engine has dropped the sequence, the session keeps what was shown
    finally:
        signal.signal(signal.SIGINT, before)
