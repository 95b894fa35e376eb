"""Reading the fields of a foreign configuration: typed, bounded, with errors that name file, field and value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from herd.architecture import Generation, LlamaConfig, RopeScaling
from herd.errors import FileFormatError, UsageError

__all__ = ["Fields", "build_config", "guess_generation"]

_REQUIRED: Any = object()
_LARGEST = 1 << 40  # no dimension of a model comes near; keeps products of fields within reason
_LARGEST_NUMBER = 1e30  # likewise for numbers that need not be whole


class Fields:
    """A configuration's key/value pairs. `where` is put before field names, for example "text_config."."""

    def __init__(self, data: Mapping[str, Any], file: Path, where: str = "") -> None:
        self.data, self.file, self.where = data, file, where

    def has(self, name: str) -> bool:
        """True when the field is there and not null."""
        return self.data.get(name) is not None

    def integer(self, name: str, default: Any = _REQUIRED, low: int = 1) -> int:
        """A whole number of at least `low`."""
        value = self._value(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not low <= value <= _LARGEST:
            self.fail(name, "must be a whole number", value=value, allowed=f"{low} or more")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A number above 0, of a size that can be calculated with."""
        value = self._value(name, default)
        if type(value) not in (int, float) or not 0 < value <= _LARGEST_NUMBER:
            self.fail(name, "must be a number above 0", value=value, allowed=f"up to {_LARGEST_NUMBER:g}")
        return float(value)

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        """True or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            self.fail(name, "must be true or false", value=value)
        return value

    def part(self, name: str) -> Fields:
        """A nested object."""
        value = self._value(name, _REQUIRED)
        if not isinstance(value, Mapping):
            self.fail(name, "must be an object", value=value)
        return Fields(value, self.file, f"{self.where}{name}.")

    def must_be(self, name: str, *allowed: object) -> None:
        """An error when the field is there with a value that would change what the model computes."""
        value = self.data.get(name)
        if value is not None and value not in allowed:
            text = " or ".join(repr(item) for item in allowed) or "nothing"
            self.fail(name, "changes the architecture in a way no Llama has", value=value, allowed=text)

    def fail(self, name: str, what: str, **details: Any) -> NoReturn:
        """Raise FileFormatError about field `name`."""
        raise FileFormatError(what, file=self.file, field=self.where + name, **details)

    def _value(self, name: str, default: Any) -> Any:
        value = self.data.get(name)
        if value is None:
            if default is _REQUIRED:
                self.fail(name, "is missing")
            return default
        return value


def build_config(file: Path, make: Callable[[], LlamaConfig]) -> LlamaConfig:
    """Call `make`; a contradiction that LlamaConfig finds becomes an error about `file`."""
    try:
        return make()
    except UsageError as error:
        raise FileFormatError(error.what, file=file, value=error.value, allowed=error.allowed) from None


def guess_generation(
    vocab_size: int, context_length: int, rope_theta: float, scaling: RopeScaling | None, tied: bool
) -> Generation:
    """The generation of a dense Llama whose file does not say it, from what tells the releases apart.

    It decides the default chat format and how Meta's files split the embedding; the mathematics does not depend on it.
    Llama 3.3 looks exactly like 3.1 and is called so.
    """
    if scaling is not None and scaling.kind == "llama3":
        return "llama3.2" if tied else "llama3.1"
    if vocab_size > 32_016 or rope_theta == 5e5:
        return "llama3"
    if rope_theta == 1e6 or vocab_size == 32_016:
        return "codellama"
    return "llama1" if context_length <= 2048 else "llama2"
