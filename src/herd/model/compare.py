"""Whether two checkpoints are the same model: what they compute, on the same tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from herd.checkpoint import resolve
from herd.errors import HerdError
from herd.model.load import load

_TOKENS = 64


def largest_difference(src: str | Path, dst: str | Path) -> float:
    """Largest absolute difference of the two models' logits, in float32, on fixed tokens.

    The models are loaded one after the other. Exactly 0 is what a conversion at the same dtype gives.
    """
    logits = []
    for path in (src, dst):
        llama = load(resolve(path), dtype=torch.float32)
        vocab = llama.output_weight.shape[0]
        # A fixed walk through the whole vocabulary: the multiplier is a prime that no vocabulary size shares.
        tokens = (torch.arange(_TOKENS) * 7919 + 13) % vocab
        with torch.inference_mode():
            logits.append(llama(tokens[None]).float())
        del llama
    if logits[0].shape != logits[1].shape:
        raise HerdError("the two models have different vocabularies", value=[x.shape[-1] for x in logits])
    return float((logits[0] - logits[1]).abs().max())
