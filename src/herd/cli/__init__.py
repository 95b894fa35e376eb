"""The `herd` command: one file per verb, imported only when that verb runs, so that `herd --help` is instant."""

from __future__ import annotations

import functools
import importlib
import io
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from herd.errors import HerdError

VERBS: dict[str, tuple[str, str]] = {
    "run": ("run", "Run a recipe: from raw text to a chat-ready, quantised model."),
    "fields": ("fields", "What a recipe can say: every field with its default, bounds and meaning."),
    "chat": ("chat", "Talk to a model in the terminal."),
    "generate": ("generate", "Continue a text."),
    "serve": ("serve", "Serve models over HTTP: OpenAI's API and a chat page."),
    "list": ("list", "Every Llama release: parameters, context, memory, licence."),
    "inspect": ("inspect", "What is in a checkpoint file or directory."),
    "convert": ("convert", "Turn a checkpoint into another format: Hugging Face, Meta, GGUF."),
    "quantize": ("quantize", "Write a GGUF file of few bits per weight."),
    "pull": ("pull", "Fetch a repository or a file from the Hugging Face hub."),
    "corpus": ("corpus", "Clean and deduplicate a folder of raw text."),
    "tokenize": ("tokenize", "Show the tokens of a text or a dialogue."),
    "evaluate": ("evaluate", "Bits per byte and exact match, with confidence intervals."),
    "needle": ("needle", "Find a number in long texts: a grid of lengths and depths, with a heat map."),
    "extend": ("extend", "Take a model to a longer context, in stages that each have to keep what it could."),
    "plan": ("plan", "A parallel layout for a training run: memory, communication, step time."),
    "scaling run": ("scaling.run", "Train a ladder: several sizes at each of a few compute budgets."),
    "scaling plan": ("scaling.plan", "List a ladder's models without training them."),
    "scaling fit": ("scaling.fit", "Fit the laws behind a ladder: best tokens, parameters and loss."),
    "scaling predict": ("scaling.predict", "The best tokens, parameters and loss for a larger budget."),
    "scaling forecast": ("scaling.forecast", "A benchmark's accuracy for a larger budget."),
    "scaling mix": ("scaling.mix", "The mix of sources whose predicted loss is lowest."),
    "scaling mix-run": ("scaling.mix_run", "Train a small model on several mixes of a recipe's sources."),
    "report": ("report", "Rebuild a run's HTML report and model card."),
    "bench": ("bench", "Measure speed and memory of a model, also against llama.cpp."),
    "bench serve": ("bench_serve", "Load a server, Herd's or another, and measure what its users would see."),
    "doctor": ("doctor", "What this machine offers and what is missing."),
}
"""Verb, of one word or two → (module in herd.cli, one line for `herd --help`)."""

_HELP = """\
Usage: herd VERB [OPTIONS] …

The Llama 3 paper as software: from raw text to a model to chat with.

Verbs:
{verbs}

Options:
  --version  Print the version.
  --help     Print this help; `herd VERB --help` explains one verb, with examples.

Examples:
  herd run recipes/pocket.yaml
  herd chat runs/pocket
  herd convert runs/pocket model.gguf --to gguf --dtype q8_0
"""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script; exits with 0, or the code of the error: 2 usage, 3 file, 4 resources."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Nothing here multiplies with numpy, whose BLAS would start a thread on every processor that spins for a while.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        sys.stdout.write(_HELP.format(verbs=_listed(VERBS)))
        raise SystemExit(0)
    family = [verb for verb in VERBS if verb.startswith(f"{arguments[0]} ")]
    if family and arguments[0] not in VERBS and arguments[1:] in ([], ["--help"], ["-h"]):
        sys.stdout.write(f"Verbs of {arguments[0]!r}; `herd {family[0]} --help` explains one:\n{_listed(family)}\n")
        raise SystemExit(0)
    if arguments[0] in ("--version", "-V"):
        from herd import __version__

        sys.stdout.write(f"herd {__version__}\n")
        raise SystemExit(0)
    words = 2 if (family and arguments[0] not in VERBS) or " ".join(arguments[:2]) in VERBS else 1
    raise SystemExit(_run(" ".join(arguments[:words]), arguments[words:]))


def _listed(verbs: Iterable[str]) -> str:
    width = max(map(len, VERBS)) + 2
    return "\n".join(f"  {verb:<{width}}{VERBS[verb][1]}" for verb in verbs)


def _run(verb: str, arguments: list[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # text that this terminal's encoding lacks is escaped, not an error
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if verb not in VERBS:
            raise _unknown(verb)
        if "HERD_ISA" in os.environ:
            _check_isa()
        return _invoke(verb, arguments)
    except HerdError as error:
        from herd.cli.output import told

        sys.stderr.write(f"herd: {told(error)}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("herd: interrupted\n")
        return 130
    except OSError as error:  # a full disk, a folder that may not be written
        place = f" at {error.filename}" if error.filename else ""
        sys.stderr.write(f"herd: the system refused{place}: {error.strerror or error}\n")
        return 4
    except MemoryError:
        sys.stderr.write("herd: there is not enough memory for this\n")
        return 4


def _invoke(verb: str, arguments: list[str]) -> int:
    import typer

    command: Callable[..., Any] = importlib.import_module(f"herd.cli.{VERBS[verb][0]}").command

    @functools.wraps(command)
    def interruptible(*args: Any, **kwargs: Any) -> None:
        # typer would turn both interruptions into exit code 1; a verb may also return its own exit code
        try:
            result = command(*args, **kwargs)
            sys.stdout.flush()
        except KeyboardInterrupt:
            sys.stderr.write("herd: interrupted\n")
            raise SystemExit(130) from None
        except BrokenPipeError:  # the reader of our output went away, for example `herd list --json | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None
        raise SystemExit(result if isinstance(result, int) else 0)

    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(verb)(interruptible)
    app(arguments, prog_name=f"herd {verb}")
    return 0


def _unknown(verb: str) -> HerdError:
    import difflib

    from herd.errors import UsageError

    near = difflib.get_close_matches(verb, VERBS, n=1)
    return UsageError(
        "no such verb",
        value=verb,
        allowed=", ".join(VERBS),
        fix=f"herd {near[0]}" if near else "herd --help",
    )


def _check_isa() -> None:
    """A misspelt HERD_ISA is the user's mistake, not a kernel's."""
    from herd.errors import UsageError

    try:
        from herd import _native
    except ImportError:  # nothing that it could choose from
        return
    try:
        _native.isa()
    except ValueError as error:
        raise UsageError(str(error)) from None
