"""The requests of a load run: pseudo-text that nobody has seen before, or the prompts of a file."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from herd.errors import FileFormatError, UsageError

# Each, with the space in front, is one token in the vocabularies of Llama 2, 3 and 4.
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house "
    "service friend father power hour game line end member law car city community name president team minute idea "
    "body information back parent face others level office door health person art war history party result change "
    "morning reason research girl moment air teacher force"
)
WORDS = _TEXT.split()

Messages = list[dict[str, Any]]


class Workload:
    """Bodies of requests by number. The same settings and seed give the same bodies; no two bodies are alike, unless
    they come from a file that has fewer prompts."""

    def __init__(
        self,
        *,
        endpoint: str,
        model: str,
        words: int,
        shared_words: int,
        max_tokens: tuple[int, int],
        seed: int,
        prompts: Sequence[str | Messages] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self._chat = endpoint == "chat"
        self._words = words
        self._max_tokens = max_tokens
        self._seed = seed
        self._prompts = prompts
        self._prefix = " ".join(random.Random(f"{seed}/shared").choices(WORDS, k=shared_words))
        self._fixed = {
            "model": model,
            "temperature": 0,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        self._extra = dict(extra or {})

    def body(self, index: int) -> bytes:
        """JSON of request number `index`."""
        chance = random.Random(f"{self._seed}/{index}")
        content = {"max_tokens": chance.randint(*self._max_tokens), **self._content(index, chance)}
        fields = self._fixed | content | self._extra
        return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()

    def _content(self, index: int, chance: random.Random) -> dict[str, Any]:
        if self._prompts:
            prompt = self._prompts[index % len(self._prompts)]
            if not self._chat:
                return {"prompt": prompt}
            return {"messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
        # Its number comes first: nothing that follows can be in a server's cache of prefixes.
        text = " ".join([f"{self._seed}.{index}:", *chance.choices(WORDS, k=max(self._words - 1, 0))])
        if not self._chat:
            return {"prompt": f"{self._prefix} {text}" if self._prefix else text}
        shared = [{"role": "system", "content": self._prefix}] if self._prefix else []
        return {"messages": [*shared, {"role": "user", "content": text}]}


def read_prompts(path: Path, endpoint: str) -> list[str | Messages]:
    """The prompts of a file of JSON lines, each with "prompt" or "messages"; what else they hold is ignored."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise FileFormatError(f"cannot be read ({error.strerror})", file=path) from None
    prompts: list[str | Messages] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            raise FileFormatError(f"line {number} is not JSON", file=path) from None
        prompt, messages = (data.get("prompt"), data.get("messages")) if isinstance(data, dict) else (None, None)
        if isinstance(prompt, str) and messages is None:
            prompts.append(prompt)
        elif prompt is None and isinstance(messages, list) and all(isinstance(each, dict) for each in messages):
            if endpoint != "chat":
                raise UsageError(f"{path}, line {number} has messages, which only chat takes", fix="--endpoint chat")
            prompts.append(messages)
        else:
            raise FileFormatError(
                f"line {number} is no request", file=path, allowed='{"prompt": "text"} or {"messages": […]}'
            )
    if not prompts:
        raise FileFormatError("has no prompts", file=path)
    return prompts
