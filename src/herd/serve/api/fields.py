"""What all requests for text may say: which model, how tokens are chosen, when to end."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any, Literal, cast

from pydantic import Field

from herd.engine import Sampling
from herd.errors import UsageError
from herd.serve.api.body import Body
from herd.serve.errors import bad

Text = Annotated[str, Field(max_length=256, min_length=1)]
Id = Annotated[str, Field(max_length=512)]
Whole = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
# The first wrong one of what may be millions ends the check: all errors together would take gigabytes.
Ids = Annotated[list[Whole], Field(min_length=1, fail_fast=True)]
MOST_PROMPTS = 256


def each_of(given: str | list[int] | list[str] | list[list[int]]) -> list[str] | list[list[int]]:
    """The prompts or texts that a request has: one is as good as a list of it."""
    several: Any = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    return cast("list[str] | list[list[int]]", several)


class StreamOptions(Body):
    """OpenAI's `stream_options`."""

    include_usage: bool = Field(default=False, description="A last event with the usage of the whole request.")
    include_obfuscation: Literal[False] | None = Field(default=None, description="Not there; events are as they are.")


class Generation(Body):
    """Fields that chat and completions share. Where no default is said, `herd.engine.Sampling` has it."""

    model: str | None = Field(
        default=None, max_length=200, description="Name of a served model; the first if left out."
    )
    max_tokens: int | None = Field(default=None, ge=1, le=1 << 30, description="Tokens to generate at most.")
    temperature: float | None = Field(default=None, ge=0, le=100, description="0 takes the likeliest token.")
    top_p: float | None = Field(default=None, ge=0, le=1, description="Keep the likeliest tokens up to this mass.")
    top_k: int | None = Field(default=None, ge=0, le=1 << 30, description="Keep so many likeliest tokens; 0: all.")
    min_p: float | None = Field(default=None, ge=0, le=1, description="Keep tokens this likely relative to the best.")
    typical_p: float | None = Field(
        default=None, ge=0, le=1, description="Keep tokens of usual surprise up to this mass."
    )
    repetition_penalty: float | None = Field(
        default=None, ge=0.01, le=100, description="Above 1 discourages repeating."
    )
    presence_penalty: float | None = Field(default=None, ge=-100, le=100, description="Off tokens generated before.")
    frequency_penalty: float | None = Field(default=None, ge=-100, le=100, description="The same, for each time.")
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        default=None, max_length=1024, description="By token id, what is added to its logit."
    )
    seed: int | None = Field(default=None, ge=0, le=(1 << 63) - 1, description="Repeats the random choices.")
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = Field(
        default=None, description="Texts before which an answer ends."
    )
    stop_token_ids: list[Whole] | None = Field(default=None, max_length=256, description="Tokens that end an answer.")
    ignore_eos: bool = Field(default=False, description="Go on where the model would end.")
    n: int | None = Field(default=None, ge=1, le=128, description="Answers to one prompt.")
    stream: bool | None = Field(default=None, description="Send tokens as they come.")
    stream_options: StreamOptions | None = None
    timeout: float | None = Field(default=None, gt=0, le=86_400, description="Seconds after which to give up.")
    user: Id | None = Field(default=None, description="Taken and not used, as all names of callers.")
    safety_identifier: Id | None = None
    prompt_cache_key: Id | None = Field(default=None, description="Taken; beginnings are shared by what they say.")
    metadata: dict[Annotated[str, Field(max_length=64)], Id] | None = Field(default=None, max_length=16)
    service_tier: Literal["auto", "default"] | None = None

    def sampling(self, **more: Any) -> Sampling:
        """The same for the engine, and `more` of its options."""
        if self.ignore_eos and more.get("grammar") is not None:
            raise bad("ignore_eos", "an answer that is held to a form ends with it")
        names = {field.name for field in dataclasses.fields(Sampling)}
        given = {name: value for name in names if (value := getattr(self, name, None)) is not None}
        if self.logit_bias is not None:
            given["logit_bias"] = {_token_id(key): value for key, value in self.logit_bias.items()}
        return checked_sampling(given | more)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def checked_sampling(options: dict[str, Any]) -> Sampling:
    """Options for the engine; what is None has its default. Raises ApiError for what only the engine can see."""
    try:
        return Sampling.from_options({name: value for name, value in options.items() if value is not None})
    except UsageError as error:
        raise bad("request", str(error)) from None


def _token_id(key: str) -> int:
    if not re.fullmatch("0|[1-9][0-9]{0,9}", key):  # one way to write each, so that none is there twice
        raise bad("logit_bias", f"{key[:40]!r} is no token id")
    return int(key)
