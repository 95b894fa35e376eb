"""The weights a run begins with: new ones, or those of a checkpoint that is trained on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from herd import checkpoint
from herd import model as models
from herd.architecture import LlamaConfig, tensor_shapes
from herd.errors import HerdError, UsageError
from herd.pretrain.config import PretrainConfig
from herd.pretrain.data import vocabulary_hash
from herd.train.filling import Weights, stored

if TYPE_CHECKING:
    from herd.tokenizer import Tokenizer

_FREE = frozenset({"context_length", "rope_theta", "rope_scaling", "generation"})
"""What a model may change when it is trained on: none of its weights depends on it."""


@contextlib.contextmanager
def begin(config: PretrainConfig, shape: LlamaConfig, tokenizer: Tokenizer) -> Iterator[tuple[Weights, str]]:
    """Where the weights come from, as long as the context lasts, and a hash of those that were read ("" for
    new ones).

    Raises UsageError for a checkpoint of another shape or with another vocabulary.
    """
    shapes = tensor_shapes(shape)
    if config.init_from is None:

        def new(name: str) -> Tensor:
            name = name if name in shapes else "embed.weight"  # a pipeline has a copy of it at its end
            return models.initial_weight(shape, name, shapes[name], config.seed)

        yield new, ""
        return
    with checkpoint.open_checkpoint(checkpoint.continuing(config.init_from)) as opened:
        _check_shape(config.init_from, opened.config, shape)
        _check_tokenizer(config.init_from, opened, tokenizer)
        yield stored(opened), weights_hash(opened)


def _check_shape(name: str, found: LlamaConfig, wanted: LlamaConfig) -> None:
    for field in dataclasses.fields(LlamaConfig):
        theirs, ours = getattr(found, field.name), getattr(wanted, field.name)
        if field.name not in _FREE and theirs != ours:
            plain = isinstance(theirs, int | float | str)
            own = f"base.model.{field.name}={theirs}" if plain else "the checkpoint's own shape as base.model"
            fix = f"tokenizer.file={name}" if field.name == "vocab_size" else own
            raise UsageError(
                f"{name} has another {field.name} than the model to train", value=theirs, allowed=f"{ours}", fix=fix
            )


def _check_tokenizer(name: str, opened: checkpoint.Checkpoint, tokenizer: Tokenizer) -> None:
    try:
        own = opened.tokenizer
    except HerdError:
        return  # it came without one: its user says which
    if vocabulary_hash(own) != vocabulary_hash(tokenizer):
        raise UsageError(
            f"{name} was trained with another vocabulary",
            value=f"{own.vocab_size} tokens",
            allowed="its own tokenizer",
            fix=f"tokenizer.file={name}",
        )


def weights_hash(opened: checkpoint.Checkpoint) -> str:
    """Of the first numbers of every tensor: a training step changes all of them."""
    digest = hashlib.sha256()
    for name in tensor_shapes(opened.config):
        first = models.to_tensor(opened[name].reshape(-1)[:256]).float()
        digest.update(name.encode() + first.numpy().tobytes())
    return digest.hexdigest()
