"""Bits per byte of text, computed the plain way."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.nn import functional

from herd import model as models
from herd.corpus import TokenShards


def bits_per_byte(path: Path, shards: TokenShards, context: int) -> float:
    """One document at a time, in windows that overlap by half."""
    llama, nats = models.load(path, dtype=torch.float32), 0.0
    for document in shards:
        ids = torch.from_numpy(document.astype("int64"))
        scored = start = 0
        while scored < len(ids) - 1:
            end = min(start + context, len(ids) - 1)
            with torch.no_grad():
                logits = llama(ids[None, start:end])[0]
            losses = functional.cross_entropy(logits, ids[start + 1 : end + 1], reduction="none")
            nats += losses[scored - start :].sum().item()
            scored, start = end, start + context // 2
    return nats / math.log(2) / int(shards.text_bytes.sum())
