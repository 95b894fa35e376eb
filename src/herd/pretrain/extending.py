"""Taking a model to a longer context, stage by stage, each from the last, as long as it keeps what it could.

    stage-4096/corpus/        training text joined to documents of that length, and the held-out text
    stage-4096/checkpoint/    the model after the stage, and all else that `herd.pretrain.run` writes
    extension.json            the plan, what each stage came to, which model is the last good one

Called again, it goes on where it was: stages that are trained are only judged again. Several ranks train the stages
together; text and judgement are rank 0's, and the others read what came of it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from herd.pretrain.beginning import weights_hash
from herd.pretrain.config import PretrainConfig
from herd.pretrain.data import pack_heldout
from herd.pretrain.extension import ExtendConfig, ExtensionStage, plan_extension
from herd.pretrain.promotion import criteria, short_bits_per_byte
from herd.pretrain.stage import run
from herd.train.announce import announce
from herd.train.config import TrainConfig
from herd.train.world import World, current_world

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
    asked: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train the stages of `plan_extension` on corpus/train.jsonl until one fails; returns the data of extension.json.

    Without `needles`, or with none wanted, short text alone decides. `asked` says what is asked for them: when it is
    something else than before, they are asked again. The result's "model" is the checkpoint of the last
    stage that met its criteria, or `model` itself; "stopped" says why it is not the last stage's. Every rank calls it.
    Raises UsageError where there is nothing to plan, nothing held out, or a directory of another extension.
    """
    out, folder = Path(out_dir), Path(corpus)
    start = checkpoint.continuing(model)
    with checkpoint.open_checkpoint(start) as opened:
        shape, tokenizer, weights = opened.config, opened.tokenizer, weights_hash(opened)
    stages = plan_extension(shape, to, config.method)
    for name in ("train.jsonl", "heldout.jsonl"):
        if not (folder / name).is_file() or not (folder / name).stat().st_size:
            text = "text to train on" if name == "train.jsonl" else "held-out text to judge by"
            raise UsageError(f"{folder} has no {text} ({name})", fix="herd corpus SOURCES... --out DIR")
    extension = _Extension(start, shape, tokenizer, folder, out, config, needles, dict(asked or {}))
    extension.change(lambda state: state.update(_begin(out, weights, to, folder, config, stages)))
    extension.change(extension.measure_before)
    for number in range(len(stages)):
        if "result" not in extension.state["stages"][number]:
            extension.train(number, stages)
        extension.judge(number, stages[number])
        if extension.state["stopped"]:
            announce(f"the extension stops {extension.state['stopped']}")
            break
    return extension.state


@dataclass
class _Extension:
    """`state` is extension.json: rank 0 writes it, and every rank reads it."""

    start: Path
    shape: LlamaConfig
    tokenizer: Tokenizer
    corpus: Path
    out: Path
    config: ExtendConfig
    needles: Needles | None
    asked: dict[str, Any]
    state: dict[str, Any] = field(default_factory=dict)
    world: World = field(default_factory=current_world)

    def change(self, action: Callable[[dict[str, Any]], None]) -> None:
        """Let rank 0 work on the state while the others wait, for as long as it takes; if it fails, it fails on all."""

        def work() -> None:
            action(self.state)
            write_json(self.out / FILE, self.state)

        self.world.first(work)
        self.state = read_json(self.out / FILE)

    def measure_before(self, state: dict[str, Any]) -> None:
        if "short_before" not in state:
            state["short_before"] = self._short(self.start)
        state.update(model=str(self.start), stopped=None)

    def train(self, number: int, stages: Sequence[ExtensionStage]) -> None:
        stage, config = stages[number], self.config
        before = stages[number - 1].context if number else self.shape.context_length
        texts, place = self.corpus, self._place(stage)
        if config.related or config.chats:
            texts = place / "corpus"
            self.world.first(lambda: _long_corpus(config, self.corpus, texts, before, stage.context, self.tokenizer))
        settings = _stage_config(config, stage, self.state["model"])
        result = run(settings, _shape(self.shape, stage), texts, self.tokenizer, place)
        kept = {name: result[name] for name in ("steps", "tokens", "loss", "epochs", "seconds")}
        self.change(lambda state: state["stages"][number].update(result=kept))

    def judge(self, number: int, stage: ExtensionStage) -> None:
        trained = self._place(stage) / "checkpoint"

        def work(state: dict[str, Any]) -> None:
            record = state["stages"][number]
            if "short" not in record:
                record["short"] = self._short(trained)
            if self.needles is not None and self.config.needles:
                if "needles" not in record or record.get("asked", self.asked) != self.asked:
                    record["needles"] = self.needles(trained, stage.context, trained.with_name("needle"))
                record["asked"] = self.asked
            asked = criteria(self.config, state["short_before"], record["short"], record.get("needles"))
            record["criteria"] = [criterion.to_dict() for criterion in asked]
            if failed := [criterion.describe() for criterion in asked if not criterion.met]:
                state["stopped"] = f"at {stage.context:,} tokens: {'; '.join(failed)}"
            else:
                state["model"] = str(trained)

        self.change(work)

    def _place(self, stage: ExtensionStage) -> Path:
        return self.out / f"stage-{stage.context}"

    def _short(self, model: Path) -> float:
        tokens = self.out / "tokens"
        if (tokens / "probe").is_dir():
            heldout = TokenShards(tokens / "probe")
        else:
            heldout = pack_heldout(self.corpus / "heldout.jsonl", self.tokenizer, tokens, self.config.probe_tokens)
        return short_bits_per_byte(model, heldout, self.shape.context_length)


def _begin(
    out: Path, weights: str, to: int, corpus: Path, config: ExtendConfig, stages: list[ExtensionStage]
) -> dict[str, Any]:
    """What extension.json has of an earlier call, or its beginning. What judges may change, and how ranks share the
    work; the rest may not."""
    free = {"tolerance", "needles", "parallel"}
    texts = [sha256_file(corpus / name) for name in ("train.jsonl", "heldout.jsonl")]
    settings: dict[str, Any] = {"weights": weights, "to": to, "texts": texts}
    settings |= config.model_dump(mode="json", exclude=free)
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
        micro_batch=config.micro_batch,
        parallel=config.parallel,
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
) -> None:
    """The corpus with its documents joined to ones of `context` tokens, some of them as chats; made once."""
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
