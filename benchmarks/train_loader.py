"""How much faster rows come from the token files than the model trains on them, in one process.

    python benchmarks/train_loader.py [--tokens 20000000] [--seq-len 512] [--batch-size 8] [--steps 20] [--json]

The text is random documents of some 20 to 20,000 tokens, in a mixture of three sources, packed both ways. Loading is
what a training step asks for (`PhasedSource.batch`: shuffled rows, targets, document ids and weights as tensors), timed
on one thread; training is whole steps of the trainer on the pocket recipe's model, with all threads, on the same rows.
Both are medians over turns that alternate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from train_step import SHAPES

from herd.architecture import LlamaConfig
from herd.corpus import TokenShards, pack_tokens
from herd.pretrain import PretrainConfig
from herd.pretrain.rows import mixture, phase_rows
from herd.pretrain.source import PhasedSource

SOURCES = {"prose": 5, "code": 3, "mathematics": 2}
VOCABULARY = SHAPES["pocket"]["vocab"]


class Random:
    """A tokenizer whose text is a seed and a length: the cost of tokenising is no part of this."""

    vocab_size, bos_id, eos_id = VOCABULARY, 0, 1

    def encode_document(self, text: str) -> list[int]:
        """BOS, so many random tokens, EOS."""
        seed, length = map(int, text.split())
        return [0, *np.random.default_rng(seed).integers(2, VOCABULARY, length).tolist(), 1]


def shards(folder: Path, tokens: int) -> dict[str, TokenShards]:
    """Token files of each source."""
    found = {}
    for number, name in enumerate(SOURCES):
        random, left, texts = np.random.default_rng(number), tokens // len(SOURCES), []
        while left > 0:
            length = int(np.exp(random.uniform(np.log(20), np.log(20_000))))
            texts.append(f"{len(texts) * len(SOURCES) + number} {length}")
            left -= length
        found[name] = pack_tokens(texts, Random(), folder / name)
    return found


def trainer(options: argparse.Namespace, source: PhasedSource, folder: Path) -> Any:
    """The trainer on the pocket recipe's model."""
    from herd.model import Llama
    from herd.train import TrainConfig, Trainer, next_token_loss

    shape = SHAPES["pocket"]
    model = Llama(
        LlamaConfig(
            dim=shape["dim"], n_layers=shape["layers"], n_heads=shape["heads"], n_kv_heads=shape["kv"],
            head_dim=shape["dim"] // shape["heads"], ffn_dim=shape["ffn"], vocab_size=VOCABULARY,
            context_length=options.seq_len,
        )
    )  # fmt: skip
    model.init_weights(0)
    sizes = {"seq_len": options.seq_len, "batch_size": options.batch_size}
    config = TrainConfig.model_validate({"steps": 10**6, "checkpoint_seconds": 0} | sizes)
    return Trainer(model, next_token_loss, source, config, folder)


def rates(options: argparse.Namespace, packing: str, files: dict[str, TokenShards], folder: Path) -> dict[str, float]:
    """Tokens a second of both."""
    train = {"seq_len": options.seq_len, "batch_size": options.batch_size, "steps": 10**5}
    mixed = {name: {"weight": weight, "match": [f"{name}/*"]} for name, weight in SOURCES.items()}
    config = PretrainConfig.model_validate({"packing": packing, "sources": mixed, "train": train})
    rows = mixture(config, files)
    source = PhasedSource(config.sizes(), phase_rows(config, rows, 1), options.batch_size)
    loop = trainer(options, source, folder / packing)
    loop.train_step()
    loading: list[float] = []
    training: list[float] = []
    for turn in range(options.rounds):
        begin = time.perf_counter()
        for step in range(turn * options.steps, (turn + 1) * options.steps):
            source.batch(step)
        loading.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        for _ in range(options.steps):
            loop.train_step()
        training.append(time.perf_counter() - begin)
    tokens = options.steps * options.batch_size * options.seq_len
    load, whole = tokens / statistics.median(loading), tokens / statistics.median(training)
    return {"loading": load, "training": whole, "ratio": load / whole}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = shards(folder, options.tokens)
        result = {packing: rates(options, packing, files, folder) for packing in ("concat", "best_fit")}
    if options.json:
        print(json.dumps(result))
        return
    for packing, found in result.items():
        print(
            f"{packing:9} loading {found['loading']:12,.0f} tokens/s, training {found['training']:8,.0f} tokens/s,"
            f" {found['ratio']:,.0f} x"
        )


if __name__ == "__main__":
    main()
