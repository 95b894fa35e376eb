"""`herd tokenize`: what a tokenizer makes of a text or a dialogue."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from herd.cli.output import emit
from herd.errors import UsageError

if TYPE_CHECKING:
    from herd.tokenizer import Tokenizer


def command(
    model: Annotated[str, typer.Argument(help="A tokenizer file, a checkpoint, a GGUF or a run.")],
    text: Annotated[str | None, typer.Argument(help="The text. With - it is read from standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read the text from this file.")] = None,
    dialog: Annotated[
        Path | None, typer.Option(help="Read a dialogue: JSON, a list of messages or {messages, tools}.")
    ] = None,
    chat_format: Annotated[str | None, typer.Option(help="Write the dialogue in this chat format.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the data as JSON.")] = False,
) -> None:
    """Show the tokens of a text or a dialogue: their ids, their bytes, and how many there are.

    In a dialogue, a + marks the tokens on which training takes loss.

    Examples:

        herd tokenize runs/pocket "def f(x):"

        herd tokenize tokenizer.model --file README.md --json

        herd tokenize llama.gguf --dialog chat.json --chat-format llama3.2
    """
    given = [name for name, value in (("TEXT", text), ("--file", file), ("--dialog", dialog)) if value is not None]
    if len(given) != 1:
        raise UsageError(
            "give one thing to tokenize", value=", ".join(given) or "nothing", allowed="TEXT, --file, --dialog"
        )
    tokenizer = _load(model, chat_format)
    data: dict[str, Any] = {"model": model, "vocab_size": tokenizer.vocab_size}
    if dialog is not None:
        messages, tools = _read_dialog(dialog)
        # A dialogue that ends with the user's turn is shown as the model would get it, ready to answer.
        encoded = tokenizer.encode_dialog(messages, tools, add_generation_prompt=_awaits_answer(messages))
        data |= {"chat_format": tokenizer.chat_format, "ids": encoded.ids, "supervised": encoded.supervised}
    else:
        content = _read_text(text, file)
        data |= {
            "ids": tokenizer.encode(content),
            "characters": len(content),
            "bytes": len(content.encode("utf-8", "replace")),
        }
    data["tokens"] = [tokenizer.token_bytes(i).decode("utf-8", "backslashreplace") for i in data["ids"]]
    emit(data, as_json, lambda: _show(data))


def _load(model: str, chat_format: str | None) -> Tokenizer:
    from herd import tokenizer
    from herd.checkpoint import resolve

    return tokenizer.load(resolve(model), chat_format)


def _read_text(text: str | None, file: Path | None) -> str:
    if file is not None:
        try:
            return file.read_bytes().decode("utf-8", "replace")
        except OSError as error:
            raise UsageError("cannot read the file", value=str(file), allowed=str(error)) from None
    if text != "-":
        return text or ""
    return sys.stdin.buffer.read().decode("utf-8", "replace")


def _read_dialog(path: Path) -> tuple[Any, Any]:
    from herd.files import read_json

    data = read_json(path)
    if isinstance(data, dict):
        return data.get("messages"), data.get("tools")
    return data, None


def _awaits_answer(messages: Any) -> bool:
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") != "assistant"


def _show(data: dict[str, Any]) -> None:
    supervised = data.get("supervised")
    lines = []
    for index, (token_id, token) in enumerate(zip(data["ids"], data["tokens"], strict=True)):
        mark = "+ " if supervised and supervised[index] else "  " if supervised else ""
        lines.append(f"{mark}{token_id:>7}  {token!r}")
    summary = f"{len(data['ids']):,} tokens"
    if supervised:
        summary += f", {sum(supervised):,} supervised, chat format {data['chat_format']}"
    elif data["ids"]:
        summary += f", {data['bytes']:,} bytes, {data['bytes'] / len(data['ids']):.2f} bytes per token"
    print("\n".join([*lines, summary]))
