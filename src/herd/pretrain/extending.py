"""Taking a model to a longer context, stage by stage, each from the last, as long as it keeps what it could.

    stage-4096/corpus/        training text joined to documents of that length, and the held-out text
    stage-4096/checkpoint/    the model after the stage, and all else that `herd.pretrain.run` writes
    extension.json            the plan, what each stage came to, which model is the last good one

Called again, it goes on where it was: stages that are trained are only judged again.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herd import checkpoint
from herd.architecture import LlamaConfig
from herd.corpus import Document, TokenShards, read_documents
from herd.corpus.chats import chats_of
from herd.corpus.document import write_documents
from herd.corpus.related import join_related
from herd.errors import FileFormatError, UsageError
from herd.files import atomic_write, read_json, sha256_file, write_json
from herd.pretrain.config import PretrainConfig
from herd.pretrain.data import pack_heldout
from herd.pretrain.extension import ExtendConfig, ExtensionStage, plan_extension
from herd.pretrain.promotion import Criterion, short_bits_per_byte
from herd.pretrain.stage import run
from herd.train.announce import announce
from herd.train.config import TrainConfig

if TYPE_CHECKING:
    from herd.tokenizer import Tokenizer

FILE = "extension.json"
Needles = Callable[[Path, int, Path], float]
"""(checkpoint, context, folder to write into) → share of the hidden numbers that the model finds at that length."""


def extend(
    model: str | Path,
    to: int,
    corpus: str | Path,
    out_dir: str | Path,
    config: ExtendConfig,
    needles: Needles | None = None,
) -> dict[str, Any]:
    """Train the stages of `plan_extension` on corpus/train.jsonl until one fails; returns the data of extension.json.

    Without `needles`, or with none wanted, short text alone decides. The result's "model" is the checkpoint of the last
    stage that met its criteria, or `model` itself; "stopped" says why it is not the last stage's. Raises UsageError
    where there is nothing to plan, nothing held out, or a directory of another extension.
    """
    out, folder = Path(out_dir), Path(corpus)
    start = checkpoint.continuing(model)
    with checkpoint.open_checkpoint(start) as opened:
        shape, tokenizer = opened.config, opened.tokenizer
    stages = plan_extension(shape, to, config.method)
    for name in ("train.jsonl", "heldout.jsonl"):
        if not (folder / name).is_file() or not (folder / name).stat().st_size:
            text = "text to train on" if name == "train.jsonl" else "held-out text to judge by"
            raise UsageError(f"{folder} has no {text} ({name})", fix="herd corpus SOURCES... --out DIR")
    state = _begin(out, str(start), to, folder, config, stages)
    if (out / "tokens" / "probe").is_dir():
        heldout = TokenShards(out / "tokens" / "probe")
    else:
        heldout = pack_heldout(folder / "heldout.jsonl", tokenizer, out / "tokens", config.probe_tokens)
    if "short_before" not in state:
        state["short_before"] = short_bits_per_byte(start, heldout, shape.context_length)
        write_json(out / FILE, state)
    state |= {"model": str(start), "stopped": None}
    for number, stage in enumerate(stages):
        place = out / f"stage-{stage.context}"
        record = state["stages"][number]
        if "result" not in record:
            before = stages[number - 1].context if number else shape.context_length
            texts = _long_corpus(config, folder, place / "corpus", before, stage.context, tokenizer)
            longer = _shape(shape, stage)
            result = run(_stage_config(config, stage, state["model"]), longer, texts, tokenizer, place)
            record["result"] = {name: result[name] for name in ("steps", "tokens", "loss", "epochs", "seconds")}
            write_json(out / FILE, state)
        if "short" not in record:
            record["short"] = short_bits_per_byte(place / "checkpoint", heldout, shape.context_length)
        if needles is not None and config.needles and "needles" not in record:
            record["needles"] = needles(place / "checkpoint", stage.context, place / "needle")
        criteria = _criteria(config, state["short_before"], record)
        record["criteria"] = [criterion.to_dict() for criterion in criteria]
        failed = [criterion for criterion in criteria if not criterion.met]
        if failed:
            state["stopped"] = f"at {stage.context:,} tokens: {'; '.join(one.describe() for one in failed)}"
            write_json(out / FILE, state)
            announce(f"the extension stops {state['stopped']}")
            break
        state["model"] = str(place / "checkpoint")
        write_json(out / FILE, state)
    return state


def _begin(
    out: Path, start: str, to: int, corpus: Path, config: ExtendConfig, stages: list[ExtensionStage]
) -> dict[str, Any]:
    """What extension.json has of an earlier call, or its beginning. What judges may change, the rest may not."""
    judges = {"tolerance", "needles"}
    texts = [sha256_file(corpus / name) for name in ("train.jsonl", "heldout.jsonl")]
    settings: dict[str, Any] = {"from": start, "to": to, "texts": texts}
    settings |= config.model_dump(mode="json", exclude=judges)
    path = out / FILE
    if not path.exists():
        return {"settings": settings, "stages": [{"plan": dataclasses.asdict(stage)} for stage in stages]}
    state = read_json(path)
    before = state.get("settings") if isinstance(state, dict) else None
    if not isinstance(before, dict):
        raise FileFormatError("is no account of an extension", file=path, field="settings", fix=f"remove {out}")
    for name, value in settings.items():
        if before.get(name) != value:
            raise UsageError(
                f"{out} was begun with {name}={before.get(name)}",
                value=f"{name}={value}",
                fix=f"another --out, or remove {out}",
            )
    return dict(state)


def _stage_config(config: ExtendConfig, stage: ExtensionStage, init_from: str) -> PretrainConfig:
    batch_size = config.batch_size or stage.batch * stage.accumulation
    train = TrainConfig(
        steps=config.steps or stage.steps,
        seq_len=stage.context,
        batch_size=batch_size,
        optimizer=config.optimizer,
        lr=config.lr or stage.lr,
        muon_lr=config.muon_lr,
        schedule=config.schedule,
        final_lr_ratio=0.0,
        warmup=config.warmup,
        log_every=1,
    )
    return PretrainConfig(
        seed=config.seed,
        init_from=init_from,
        packing="best_fit",  # a joined document begins its row, and fills it
        evaluations=0,
        probe_tokens=config.probe_tokens,
        save_dtype=config.save_dtype,
        train=train,
    )


def _shape(shape: LlamaConfig, stage: ExtensionStage) -> LlamaConfig:
    return dataclasses.replace(
        shape, context_length=stage.context, rope_theta=stage.rope_theta, rope_scaling=stage.rope_scaling
    )


def _long_corpus(
    config: ExtendConfig, corpus: Path, place: Path, before: int, context: int, tokenizer: Tokenizer
) -> Path:
    """The corpus with its documents joined to ones of `context` tokens, some of them as chats; made once."""
    if not (config.related or config.chats):
        return corpus
    made = place / "train.jsonl"
    if not made.exists():
        documents = list(read_documents(corpus / "train.jsonl"))
        n_bytes, n_tokens = _size(documents[:: max(1, len(documents) // 100)], tokenizer)
        target = round(1.05 * (context + 1) * n_bytes / n_tokens)  # text differs in how many bytes a token has
        with atomic_write(place / "heldout.jsonl") as file:
            file.write((corpus / "heldout.jsonl").read_bytes())
        longer: Iterable[Document] = documents
        if config.related:
            longer = join_related(documents, target, config.seed)
        lengths = [target // part for part in _halvings(context // before)]
        write_documents(made, _some_as_chats(longer, lengths, config))
    return place


def _halvings(times: int) -> list[int]:
    """1, 2, 4, … up to `times`."""
    return [1 << power for power in range(times.bit_length())]


def _some_as_chats(documents: Iterable[Document], lengths: list[int], config: ExtendConfig) -> Iterator[Document]:
    """Each length in bytes gets as many documents: short chats teach to look back, long ones how far."""
    chance = random.Random(config.seed)
    for document in documents:
        if chance.random() < config.chats:
            yield from chats_of(document, chance.choice(lengths), config.seed)
        else:
            yield document


def _size(documents: list[Document], tokenizer: Tokenizer) -> tuple[int, int]:
    """Bytes and tokens of documents."""
    tokens = sum(len(tokenizer.encode(document.text)) for document in documents)
    return sum(document.n_bytes for document in documents), max(1, tokens)


def _criteria(config: ExtendConfig, short_before: float, record: dict[str, Any]) -> list[Criterion]:
    allowed = short_before * (1 + config.tolerance)
    found = [Criterion("bits per byte of short text", record["short"], allowed, at_most=True)]
    if config.needles and "needles" in record:
        found.append(Criterion("needles found", record["needles"], config.needles, at_most=False))
    return found
