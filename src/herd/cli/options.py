"""The options that several verbs have in common, said once: how a model is loaded, and how its tokens are chosen."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_type_hints

import typer

if TYPE_CHECKING:
    from herd.architecture import LlamaConfig
    from herd.engine import LLM, SamplingOptions

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Choosing:
    """How tokens are chosen and when an answer ends. Names and defaults are those of `herd.engine.Sampling`."""

    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens to generate at most (default: 256, or what the context leaves).")
    ] = None
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.6
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens up to this mass.")] = 0.9
    top_k: Annotated[int, typer.Option(help="Keep this many most likely tokens (0: all).")] = 0
    min_p: Annotated[float, typer.Option(help="Keep tokens this likely relative to the best.")] = 0.0
    typical_p: Annotated[float, typer.Option(help="Keep the tokens of usual surprise up to this mass.")] = 1.0
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages repeating.")] = 1.0
    presence_penalty: Annotated[float, typer.Option(help="Above 0 discourages what was generated before.")] = 0.0
    frequency_penalty: Annotated[float, typer.Option(help="The same, for each time it was.")] = 0.0
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(metavar="ID=VALUE", help="Make a token likelier, or with -100 impossible; may be repeated."),
    ] = None
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this; may be repeated.")] = None
    seed: Annotated[int | None, typer.Option(help="Repeat the random choices that this number gave.")] = None
    adapter: Annotated[str | None, typer.Option(metavar="PATH", help="Apply a LoRA adapter, as PEFT writes it.")] = None

    def options(self, llm: LLM) -> SamplingOptions:
        """The same for the functions of `llm`, which has loaded the adapter then."""
        given: Any = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.adapter is not None:
            llm.load_adapter(Path(self.adapter).expanduser(), self.adapter)
        options: SamplingOptions = given | {"logit_bias": _biases(self.logit_bias or [])}
        return options


@dataclasses.dataclass(frozen=True)
class Loading:
    """How a model is loaded. Names and defaults are those of `herd.LLM`."""

    quant: Annotated[
        str | None, typer.Option(help="How weights are held: q4_k_m, q8_0, bf16, … (default: as they are stored).")
    ] = None
    kv: Annotated[str, typer.Option(help="How keys and values are held: bf16, int8 or f32.")] = "bf16"
    ctx: Annotated[int | None, typer.Option(help="Tokens of context (default: the model's).")] = None
    threads: Annotated[int | None, typer.Option(help="CPU threads (default: one for each usable processor).")] = None
    cpus: Annotated[str, typer.Option(metavar="0,1,…", help="Processors to bind the threads to, one each.")] = ""
    draft: Annotated[
        str | None, typer.Option(help='What guesses ahead, to be checked: "ngram", or a smaller model.')
    ] = None
    backend: Annotated[str, typer.Option(help="What computes: native, torch, or auto.")] = "auto"

    def arguments(self) -> dict[str, Any]:
        """The same for `herd.LLM`. Raises UsageError, with the option's name, for what no model can be loaded with."""
        cpus = numbers("--cpus", self.cpus, 0, 1023) if self.cpus else []
        self._check(cpus)
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        threads = None if self.threads is None else usable_threads(self.threads)
        return given | {"threads": threads, "cpus": cpus}

    def _check(self, cpus: list[int]) -> None:
        from herd.checkpoint import resolve
        from herd.checkpoint.mixes import MIXES
        from herd.checkpoint.numbers import PLAIN
        from herd.engine.backend import BACKENDS, KvType, checked_cpus
        from herd.engine.request import check_whole
        from herd.errors import UsageError, near

        for option, value, known in (
            ("--quant", self.quant, (*MIXES, *PLAIN)),
            ("--kv", self.kv, get_args(KvType)),
            ("--backend", self.backend, ("auto", *BACKENDS)),
        ):
            if value is not None and value not in known:
                raise UsageError(f"{option} is not valid", value=value, allowed=near(value, known))
        for option, number, most in (("--ctx", self.ctx, 1 << 30), ("--threads", self.threads, 4096)):
            if number is not None:
                check_whole(option, number, 1, most)
        with _named("--cpus"):
            checked_cpus(cpus)
        if self.draft not in (None, "ngram"):
            with _named("--draft"):
                resolve(str(self.draft))


@contextlib.contextmanager
def _named(option: str) -> Iterator[None]:
    """Errors of the block are about an option."""
    from herd.errors import HerdError

    try:
        yield
    except HerdError as error:
        raise error.inside(option) from None


def takes_groups(command: Callable[..., T]) -> Callable[..., T]:
    """A parameter whose type is a data class stands for that class's fields, an option each."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: p.annotation for name, p in signature.parameters.items() if dataclasses.is_dataclass(p.annotation)
    }

    @functools.wraps(command)
    def with_options(**given: Any) -> T:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        return command(**given)

    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        parameters += _fields(groups[name]) if name in groups else [parameter]
    with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def _fields(group: Any) -> list[inspect.Parameter]:
    types, kind = get_type_hints(group, include_extras=True), inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(field.name, kind, default=field.default, annotation=types[field.name])
        for field in dataclasses.fields(group)
    ]


def numbers(option: str, text: str, low: int, high: int) -> list[int]:
    """The whole numbers of a list such as "1,8", each once."""
    from herd.errors import UsageError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and low <= int(part) <= high for part in parts):
        raise UsageError(f"{option} is no list of numbers", value=text, allowed=f"numbers from {low} to {high}, as 1,8")
    return list(dict.fromkeys(map(int, parts)))


def size_bytes(text: str) -> int:
    """A size such as 16GiB or 500MB."""
    import re

    from herd.errors import UsageError

    units = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in units:
        raise UsageError("this is no size", value=text, allowed="a number with MB, GB, MiB or GiB")
    return int(float(match[1]) * units[match[2]])


def shape_of(model: str) -> LlamaConfig:
    """The shape of a release by its name, or of a checkpoint, whose weights are not read."""
    from herd.architecture import releases

    if model in releases and not Path(model).exists():
        return releases[model].config
    from herd import checkpoint

    with checkpoint.open_checkpoint(checkpoint.resolve(model)) as opened:
        return opened.config


def usable_threads(asked: int | None) -> int:
    """How many threads run when so many are asked for (None: as many as can); a note says where they are fewer."""
    from herd.engine.backend import thread_count

    used = thread_count(asked)
    if asked is not None and used < asked:
        sys.stderr.write(f"herd: --threads {asked} are more than the {used} usable here: running with {used}\n")
    return used


def _biases(pairs: list[str]) -> dict[int, float]:
    from herd.errors import UsageError

    biases = {}
    for pair in pairs:
        token_id, _, value = pair.partition("=")
        try:
            biases[int(token_id)] = float(value)
        except ValueError:
            raise UsageError(
                "--logit-bias is no ID=VALUE", value=pair, allowed="a token's id and a number, as 42=-100"
            ) from None
    return biases
