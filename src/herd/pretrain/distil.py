"""The pretraining stage with teachers: as `herd.pretrain.run`, with another loss."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herd import checkpoint
from herd import model as models
from herd.architecture import LlamaConfig, parameter_count
from herd.errors import UsageError
from herd.files import write_json
from herd.pretrain.beginning import begin
from herd.pretrain.config import PretrainConfig
from herd.pretrain.heldout import HeldOut, score
from herd.pretrain.rows import account, mixture, phase_rows
from herd.pretrain.source import PhasedSource
from herd.pretrain.stage import _check, _flops, _token_files, _windows, resolved
from herd.train.batches import Batch
from herd.train.callbacks import Callback
from herd.train.distillation import DistilConfig, Distillation
from herd.train.export import export
from herd.train.trainer import Trainer, pick_device
from herd.train.world import current_world

if TYPE_CHECKING:
    from herd.tokenizer import Tokenizer


def run(
    config: PretrainConfig,
    distil: DistilConfig,
    shape: LlamaConfig,
    corpus: str | Path,
    tokenizer: Tokenizer,
    out_dir: str | Path,
) -> dict[str, Any]:
    """Train a model on corpus/train.jsonl and on what teachers make of it; writes and returns what `pretrain.run` does.

    Raises UsageError as it does, for `max_minutes`, and for teachers with another vocabulary.
    """
    if config.max_minutes is not None:
        raise UsageError("steps with teachers cannot be planned by max_minutes: give train.steps alone")
    started, out, train = time.monotonic(), Path(out_dir), resolved(config)
    _check(config, shape, tokenizer)
    world = current_world(train.parallel, pick_device(train).type)
    teachers = [models.load(checkpoint.continuing(name)) for name in distil.teachers]
    loss = Distillation(teachers, distil.weight, shape.vocab_size, train.parallel)
    files = _token_files(world, config, Path(corpus), tokenizer, out / "tokens")
    model, begun_from = begin(config, shape, tokenizer)
    rows, phases = mixture(config, files.sources), config.sizes()
    taught = f"{begun_from}, taught by {distil.model_dump_json()}"
    source = PhasedSource(phases, phase_rows(config, rows, files.train.eos_id), train.micro_batch_rows, world, taught)
    callbacks: list[Callback] = []
    if files.probe is not None and config.evaluations:
        callbacks.append(HeldOut(_windows(files.probe, train), config.evaluations))
    loop: Trainer[Batch] = Trainer(model, loss, source, train, out, callbacks, world=world)
    outcome = loop.fit()
    export(
        loop,
        lambda weights: checkpoint.save(
            out / "checkpoint", shape, weights, format="hf", dtype=config.save_dtype, tokenizer=tokenizer
        ),
    )
    result: dict[str, Any] = {
        **outcome.to_dict(),
        **account(config, rows, files.sources, loop.cursor),
        **_flops(outcome, shape, phases, loop.cursor),
        "parameters": parameter_count(shape),
        "teachers": list(distil.teachers),
        "corpus_tokens": files.train.n_tokens,
        "left_out_documents": files.left_out,
        "batch_tokens": train.batch_tokens,
        "precision": str(loop.precision).removeprefix("torch."),
        "compiled": loop.blocks.active,
        "stage_seconds": time.monotonic() - started,
    }
    if files.heldout is not None:
        final = score(loop, _windows(files.heldout, train))
        if not loop.logged("heldout_loss"):
            loop.log(final)
        result |= final
    if world.rank == 0:
        write_json(out / "result.json", result)
    world.barrier()
    return result
