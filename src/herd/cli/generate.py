"""`herd generate`: continue a text."""

from __future__ import annotations

import dataclasses
import io
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from herd.cli.options import Choosing, Loading, takes_groups

if TYPE_CHECKING:
    from collections.abc import Iterable

    from herd.engine import Chunk, Completion


@takes_groups
def command(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, GGUF file, run directory or pulled repository.")],
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; left out, it is read from a pipe.")] = None,
    *,
    choosing: Choosing,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on where the model would end.")] = False,
    n: Annotated[int, typer.Option(help="Continuations of the text, one after the other under a heading.")] = 1,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="With --json: how likely each token was.")] = False,
    top_logprobs: Annotated[int, typer.Option(help="With --json: the most likely tokens at each place.")] = 0,
    loading: Loading,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole completion as JSON at the end.")] = False,
) -> None:
    """Continue a text; the continuation streams to standard output, everything else goes to standard error.

    Of a run directory it is the base model that continues: the tuned one is for `herd chat`. Leave spaces at the end of
    the text to the model: tokens begin with them, so that no text it has read goes on behind one. A text from a pipe is
    taken without the line break at its end.

    Examples:

        herd generate runs/pocket "def"

        herd generate model.gguf "import" --temperature 0 --max-tokens 40

        herd generate runs/pocket "x = [" --stop "]" --seed 7 --json

        herd generate runs/pocket "def" --n 3 --top-logprobs 5 --json

        cat start.py | herd generate runs/pocket
    """
    from herd.checkpoint import continuing
    from herd.cli.output import emit, speak
    from herd.engine import LLM
    from herd.errors import UsageError
    from herd.progress import status

    if (logprobs or top_logprobs) and not as_json:
        raise UsageError("log-probabilities are part of the JSON output", fix="add --json")
    if prompt is None:
        if sys.stdin.isatty():
            raise UsageError("no text to continue", fix='herd generate MODEL "text", or pipe the text in')
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        prompt = sys.stdin.read().removesuffix("\n")

    prompt = prompt.encode("utf-8", "replace").decode("utf-8")  # an argument may hold bytes that are no UTF-8
    arguments = loading.arguments()
    status("loading …")
    with LLM(continuing(model), **arguments) as llm:
        status("")
        options = choosing.options(llm)
        options |= {"ignore_eos": ignore_eos, "logprobs": logprobs, "top_logprobs": top_logprobs}
        if n == 1 and not as_json:
            _show(llm.stream(prompt, **options))
            return
        completions = llm.generate([prompt], n=n, **options)
    if as_json:
        found = [dataclasses.asdict(completion) for completion in completions]
        emit({"model": str(llm.path), "prompt": prompt, **(found[0] if n == 1 else {"completions": found})}, True)
        return
    for i, completion in enumerate(completions, 1):
        sys.stderr.write(f"── {i} of {n} ──\n")
        speak(completion.text)
        _end(completion)


def _show(chunks: Iterable[Chunk]) -> None:
    """A continuation as it comes."""
    from herd.cli.output import speak

    completion = None
    for chunk in chunks:
        completion = chunk.completion
        speak(chunk.text)
    assert completion is not None, "a stream ends with its completion"
    _end(completion)


def _end(completion: Completion) -> None:
    """The end of a continuation's line, and for a person a summary."""
    from herd.cli.output import console, guesses
    from herd.progress import interactive

    sys.stdout.write("\n")
    sys.stdout.flush()
    if interactive():
        times = completion.timings
        parts = [f"{completion.usage.completion_tokens} tokens", f"{times.decode_tokens_per_s:.0f} tok/s"]
        if times.drafted_tokens:
            parts.append(guesses(times.accepted_tokens, times.drafted_tokens))
        console().print(" · ".join([*parts, completion.finish_reason, f"seed {completion.seed}"]), style="dim")
