"""The rows of a run, out of its configuration and its token files: a mixture, in phases. Needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from herd.corpus import PackedDataset, TokenShards
from herd.corpus.mixture import MixedRows, Mixture, Stretch
from herd.pretrain.config import WHOLE, PretrainConfig


def mixture(config: PretrainConfig, sources: Mapping[str, TokenShards]) -> Mixture:
    """Where every row of the run comes from. Raises UsageError for rows and sources that do not fit."""
    packed = {
        name: PackedDataset(shards, config.longest_row, 1, _seed(config.seed, name), config.packing)
        for name, shards in sources.items()
    }
    return Mixture(packed, stretches(config), config.seed)


def stretches(config: PretrainConfig) -> list[Stretch]:
    """Where rows change their length or sources their weights: by phases, by `mix`, and where annealing begins."""
    sizes = config.sizes()
    weights: dict[int, Mapping[str, float]] = {0: {name: source.weight for name, source in config.parts.items()}}
    weights |= {sizes.row_at(change.from_tokens): change.weights for change in config.mix}
    if config.anneal.weights:
        weights[sizes.rows_before(config.train.steps - config.train.anneal)] = config.anneal.weights
    firsts = sorted({*weights, *(phase.first_row for phase in sizes)})
    found, current = [], weights[0]
    for first in firsts:
        current = weights.get(first, current)
        length = next(phase.seq_len for phase in reversed(sizes) if phase.first_row <= first)
        found.append(Stretch(first, length, current))
    return found


def phase_rows(config: PretrainConfig, rows: Mixture, pad_id: int) -> list[MixedRows]:
    """The rows of each phase."""
    return [MixedRows(rows, phase.first_row, phase.batch_size, pad_id) for phase in config.sizes()]


def account(config: PretrainConfig, rows: Mixture, sources: Mapping[str, TokenShards], steps: int) -> dict[str, Any]:
    """For result.json: what `steps` steps have read. `epochs`: of all, and for each source with its `rows`, its
    `share` of the rows and the `tokens` it has."""
    before = config.sizes().rows_before(steps)
    counts, epochs = rows.rows_read(before), rows.epochs(before)
    each = {
        name: {
            "rows": counts[name],
            "share": counts[name] / before if before else 0.0,
            "epochs": epochs[name],
            "tokens": shards.n_tokens,
        }
        for name, shards in sources.items()
    }
    total = sum(shards.n_tokens for shards in sources.values())
    return {
        "epochs": sum(entry["epochs"] * entry["tokens"] for entry in each.values()) / total,
        "sources": each,
        "phases": [
            {"first_step": p.first_step, "first_token": p.first_token, "seq_len": p.seq_len, "batch_size": p.batch_size}
            for p in config.sizes()
            if p.first_step < max(steps, 1)
        ],
    }


def _seed(seed: int, name: str) -> int:
    """A source's own seed, which stays when other sources come or go; that of the run where there is one source."""
    if name == WHOLE:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7])
