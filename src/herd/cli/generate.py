"""`herd generate`: continue a text."""

from __future__ import annotations

import dataclasses
import io
import sys
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, GGUF file, run directory or pulled repository.")],
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; left out, it is read from a pipe.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens to generate at most. Default: 256, or what the context leaves.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.6,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens up to this mass.")] = 0.9,
    top_k: Annotated[int, typer.Option(help="Keep this many most likely tokens (0: all).")] = 0,
    min_p: Annotated[float, typer.Option(help="Keep tokens this likely relative to the best.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages repeating.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Repeat a random choice.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    ctx: Annotated[int | None, typer.Option(help="Tokens of context (default: the model's).")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    quant: Annotated[
        str | None, typer.Option(help="How weights are held: q4_k_m, q8_0, bf16, … (default: as they are stored).")
    ] = None,
    kv: Annotated[str, typer.Option(help="How keys and values are held: bf16, int8 or f32.")] = "bf16",
    draft: Annotated[
        str | None, typer.Option(help='What guesses ahead, to be checked: "ngram", or a smaller model.')
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole completion as JSON at the end.")] = False,
) -> None:
    """Continue a text; the continuation streams to standard output, everything else goes to standard error.

    Of a run directory it is the base model that continues: the tuned one is for `herd chat`. Spaces at the end of the
    text are left to the model: tokens begin with them, so that no text it has read goes on behind one.

    Examples:

        herd generate runs/pocket "def"

        herd generate model.gguf "import" --temperature 0 --max-tokens 40

        herd generate runs/pocket "x = [" --stop "]" --seed 7 --json

        cat start.py | herd generate runs/pocket
    """
    from herd.checkpoint import continuing
    from herd.cli.output import console, emit, speak
    from herd.engine import LLM
    from herd.errors import UsageError
    from herd.progress import interactive, status

    if prompt is None:
        if sys.stdin.isatty():
            raise UsageError("no text to continue", fix='herd generate MODEL "text", or pipe the text in')
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        prompt = sys.stdin.read()

    prompt = prompt.encode("utf-8", "replace").decode("utf-8")  # an argument may hold bytes that are no UTF-8
    prompt = prompt.rstrip(" ")
    status("loading …")
    with LLM(continuing(model), quant=quant, ctx=ctx, threads=threads, kv=kv, draft=draft) as llm:
        status("")
        chunks = llm.stream(
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
        )
        completion = None
        for chunk in chunks:
            completion = chunk.completion
            if not as_json:
                speak(chunk.text)
        assert completion is not None, "a stream ends with its completion"
        if as_json:
            emit({"model": str(llm.path), "prompt": prompt, **dataclasses.asdict(completion)}, True)
            return
        sys.stdout.write("\n")
        if interactive():
            speed = f"{completion.timings.decode_tokens_per_s:.0f} tok/s"
            tokens = f"{completion.usage.completion_tokens} tokens"
            console().print(f"{tokens} · {speed} · {completion.finish_reason} · seed {completion.seed}", style="dim")
