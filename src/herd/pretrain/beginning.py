"""The weights a run begins with: new ones, or those of a checkpoint that is trained on."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING

import torch

from herd import checkpoint
from herd import model as models
from herd.architecture import LlamaConfig
from herd.errors import HerdError, UsageError
from herd.pretrain.config import PretrainConfig
from herd.pretrain.data import vocabulary_hash

if TYPE_CHECKING:
    from herd.tokenizer import Tokenizer

_FREE = frozenset({"context_length", "rope_theta", "rope_scaling", "generation"})
"""What a model may change when it is trained on: none of its weights depends on it."""


def begin(config: PretrainConfig, shape: LlamaConfig, tokenizer: Tokenizer) -> tuple[models.Llama, str]:
    """The model in fp32, and a hash of the weights it was read from ("" for new ones).

    Raises UsageError for a checkpoint of another shape or with another vocabulary.
    """
    if config.init_from is None:
        model = models.Llama(shape)
        model.init_weights(config.seed)
        return model, ""
    with checkpoint.open_checkpoint(checkpoint.continuing(config.init_from)) as opened:
        _check_shape(config.init_from, opened.config, shape)
        _check_tokenizer(config.init_from, opened, tokenizer)
        model = models.from_arrays(shape, opened, dtype=torch.float32)
    return model, _hash(model)


def _check_shape(name: str, found: LlamaConfig, wanted: LlamaConfig) -> None:
    for field in dataclasses.fields(LlamaConfig):
        theirs, ours = getattr(found, field.name), getattr(wanted, field.name)
        if field.name not in _FREE and theirs != ours:
            raise UsageError(
                f"{name} has another {field.name} than the model to train", value=theirs, allowed=f"{ours}"
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
        )


def _hash(model: models.Llama) -> str:
    """Of the first numbers of every tensor: a training step changes all of them."""
    digest = hashlib.sha256()
    for name, array in models.state_arrays(model):
        digest.update(name.encode() + array.reshape(-1)[:256].tobytes())
    return digest.hexdigest()
