"""The thin table that binds stage names to the rooms that do the work. Importing it imports PyTorch.

corpus → tokenizer → base → extend → sft → evaluate → quantise → report
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field, model_validator

from herd import evaluate, pretrain, tokenizer
from herd.align import sft
from herd.config import Config
from herd.corpus import STDLIB, CorpusConfig, check_sources, curate, read_documents
from herd.errors import UsageError
from herd.files import read_json
from herd.pretrain import PretrainConfig
from herd.pretrain.adapting import AdaptConfig, adapt
from herd.recipe.earlier import absent, earlier, fingerprint
from herd.recipe.hashing import fingerprint_paths
from herd.recipe.long_context import ExtendStageConfig, extend_stage
from herd.recipe.needle_grid import PromoteConfig
from herd.recipe.quantise import QuantiseConfig, quantise
from herd.recipe.report import ReportConfig, RunData, write_report
from herd.recipe.shape import ModelShape
from herd.recipe.stage import Stage, StageContext
from herd.recipe.tokenise import TokenizerConfig, train_tokenizer
from herd.recipe.units import count, size
from herd.train.distillation import DistilConfig
from herd.train.trainer import pick_device
from herd.train.world import current_world

Inputs = Mapping[str, Path]


class BaseConfig(PretrainConfig):
    """Pretraining, and the shape of the model to train."""

    model: ModelShape = Field(default_factory=ModelShape, description="the model's shape")
    adapt: AdaptConfig | None = Field(
        default=None,
        description="make init_from's checkpoint fit: prune it to the model's shape, add rows for new tokens:"
        " {calibration_rows, calibration_tokens}; null: it must fit",
    )
    distil: DistilConfig | None = Field(
        default=None, description="train on what teachers predict as well: {teachers, weight}; null: on the text alone"
    )
    promote: PromoteConfig | None = Field(
        default=None,
        description="what must hold where a phase ends, or the run stops there: {tolerance, needles, short}, and"
        " {lengths, depths, samples, digits, haystack} as in extend; null: phases follow each other",
    )

    @model_validator(mode="after")
    def _begins_with_something(self) -> BaseConfig:
        if self.adapt is not None and self.init_from is None:
            raise ValueError("adapt is of the checkpoint that init_from names, and there is none")
        if self.promote is not None and self.adapt is not None:
            raise ValueError("promote: it asks for what init_from's checkpoint could, and adapt takes parts of it away")
        if self.promote is not None and (why := self.why_not_judged()):
            raise ValueError(f"promote: {why}")
        return self

    @property
    def checkpoints(self) -> list[str]:
        """Names of the checkpoints that it reads."""
        return [*([self.init_from] if self.init_from else []), *(self.distil.teachers if self.distil else [])]


def stage_table() -> list[Stage]:
    """All known stages."""
    return [
        Stage("corpus", CorpusConfig, _corpus, fingerprint=_sources, needs=_missing_sources),
        Stage(
            "tokenizer",
            TokenizerConfig,
            _tokenizer,
            inputs=("corpus",),
            fingerprint=lambda config: fingerprint([config.file]),
            needs=lambda config: absent(earlier, [config.file]),
        ),
        Stage(
            "base",
            BaseConfig,
            _base,
            inputs=("corpus", "tokenizer"),
            version=2,
            resumes=True,
            ranks=True,
            gates=("promote",),
            fingerprint=_beginnings,
            check=_base_fits,
            needs=lambda config: absent(earlier, config.checkpoints),
            check_ranks=_shares_work,
        ),
        Stage(
            "extend",
            ExtendStageConfig,
            _extend,
            inputs=("corpus",),
            optional_inputs=("base",),
            resumes=True,
            ranks=True,
            judges=("tolerance", "needles"),
            fingerprint=lambda config: fingerprint([config.init_from]),
            check=_extends_something,
            needs=lambda config: absent(earlier, [config.init_from]),
        ),
        Stage(
            "sft",
            sft.SftConfig,
            _sft,
            inputs=("corpus", "tokenizer"),
            optional_inputs=_PRETRAINED,
            version=2,
            resumes=True,
            ranks=True,
            check=_rows_fit,
        ),
        Stage(
            "evaluate",
            evaluate.EvaluateConfig,
            _evaluate,
            inputs=("corpus",),
            optional_inputs=_MODELS,
            version=3,
            check=_has_model,
        ),
        Stage(
            "quantise",
            QuantiseConfig,
            _quantise,
            inputs=("corpus",),
            optional_inputs=_MODELS,
            version=2,
            check=_has_model,
        ),
        Stage("report", ReportConfig, _report, optional_inputs=_REPORTED, version=3),
    ]


_PRETRAINED = ("base", "extend")
_MODELS = (*_PRETRAINED, "sft")
"""Stages that leave a model, in the order in which they build on one another."""
_REPORTED = ("corpus", "tokenizer", *_MODELS, "evaluate", "quantise")


def _sources(config: CorpusConfig) -> object:
    """What stands behind the names of the sources now: this Python's version, the content of files and folders."""
    paths = [source for source in config.sources if source != STDLIB]
    return {"paths": fingerprint_paths(paths), "python": sys.version if STDLIB in config.sources else None}


def _missing_sources(config: CorpusConfig) -> Sequence[UsageError]:
    fix = "corpus.sources=[FOLDER], or --shrink for a small copy on the standard library"
    found = absent(lambda source: check_sources([source]), config.sources)
    return [UsageError(error.what, value=error.value, allowed=error.allowed, fix=fix) for error in found]


def _beginnings(config: BaseConfig) -> object:
    """What lies behind the names of checkpoints and of shards now."""
    found = fingerprint(config.checkpoints)
    shards = [path for source in config.sources.values() for path in source.shards]
    return {"checkpoints": found, "shards": fingerprint_paths(shards)} if shards else found


def _shares_work(config: BaseConfig, ranks: int) -> None:
    """The ranks can share the layers and rows; the vocabulary is not made yet, and taken to fit."""
    config.check_layout(config.model.to_llama(1024 * config.train.parallel.tp), ranks)


def _base_fits(config: BaseConfig, configs: Mapping[str, Config]) -> None:
    """The longest rows are no longer than the context; where phases are judged, there is text to judge them by."""
    config.train.model_copy(update={"seq_len": config.longest_row}).check_context(config.model.context_length)
    corpus = configs["corpus"]
    assert isinstance(corpus, CorpusConfig)
    if config.promote is not None and not corpus.heldout_fraction:
        raise UsageError("promote judges by held-out text, and there is none", fix="corpus.heldout_fraction=0.01")


def _rows_fit(config: sft.SftConfig, configs: Mapping[str, Config]) -> None:
    """Rows are at most as long as the context of the model that is tuned."""
    _has_model(config, configs)
    model = [configs[name] for name in _PRETRAINED if name in configs][-1]
    assert isinstance(model, BaseConfig | ExtendStageConfig)
    config.train.check_context(model.to if isinstance(model, ExtendStageConfig) else model.model.context_length)


def _has_model(config: Config, configs: Mapping[str, Config]) -> None:
    if not any(name in configs for name in _PRETRAINED):
        raise UsageError(
            "this stage needs a model, and no stage before it leaves one", allowed=" or ".join(_PRETRAINED)
        )


def _extends_something(config: ExtendStageConfig, configs: Mapping[str, Config]) -> None:
    if config.init_from is None and "base" not in configs:
        raise UsageError("nothing to extend: neither init_from nor the stage base before this one", fix="init_from")


def _corpus(config: CorpusConfig, inputs: Inputs, out: Path, context: StageContext) -> str:
    stats = curate(config, out)
    return f"{size(stats.train_bytes)} to train on, {size(stats.heldout_bytes)} held out"


def _tokenizer(config: TokenizerConfig, inputs: Inputs, out: Path, context: StageContext) -> str:
    results = train_tokenizer(config, inputs["corpus"], out)
    text = results["heldout"] if results["heldout"]["tokens"] else results["train"]
    return f"{results['vocab_size']:,} tokens, {text['bytes_per_token']:.2f} bytes per token"


def _base(config: BaseConfig, inputs: Inputs, out: Path, context: StageContext) -> str:
    words, corpus = tokenizer.load(inputs["tokenizer"]), inputs["corpus"]
    shape = config.model.to_llama(words.vocab_size)
    if config.adapt is not None and config.init_from is not None:
        world = current_world(config.train.parallel, pick_device(config.train).type)
        begin = adapt(config.adapt, config.init_from, shape, corpus, words, out / "adapted", config.seed, world)
        config = config.model_copy(update={"init_from": str(begin)})
    promote = config.promote.promote(words, config) if config.promote else None
    pretrain.run(config, shape, corpus, words, out, config.distil, promote)
    return _trained(out)


def _extend(config: ExtendStageConfig, inputs: Inputs, out: Path, context: StageContext) -> str:
    model = earlier(config.init_from) if config.init_from else inputs["base"] / "checkpoint"
    return extend_stage(config, model, inputs["corpus"], out)


def _sft(config: sft.SftConfig, inputs: Inputs, out: Path, context: StageContext) -> str:
    words = tokenizer.load(inputs["tokenizer"])
    rehearsal = (document.text for document in read_documents(inputs["corpus"] / "train.jsonl"))
    sft.run(config, _models(inputs, _PRETRAINED)[-1], words, out, rehearsal=rehearsal)
    return _trained(out)


def _evaluate(config: evaluate.EvaluateConfig, inputs: Inputs, out: Path, context: StageContext) -> str:
    models = {name: inputs[name] / "checkpoint" for name in _MODELS if name in inputs}
    results = evaluate.run(config, models, _heldout(inputs), out)
    bits = next(iter(results["bits_per_byte"].values()), None)
    match = list(results["exact_match"].values())[-1:]
    said = [f"{bits['bits_per_byte']:.3f} bits per byte"] if bits else []
    said += [f"{100 * data['overall']['score']:.1f} % exact match" for data in match]
    return ", ".join(said)


def _quantise(config: QuantiseConfig, inputs: Inputs, out: Path, context: StageContext) -> str:
    formats = quantise(config, _models(inputs)[-1], _heldout(inputs), out, name=context.recipe.name)["formats"]
    return ", ".join(f"{name} {size(entry['bytes'])}" for name, entry in formats.items() if name != "source")


def _report(config: ReportConfig, inputs: Inputs, out: Path, context: StageContext) -> str:
    recipe = context.recipe
    run = RunData(
        name=recipe.name,
        seed=recipe.seed,
        command=context.command,
        description=recipe.description,
        directories=inputs,
        config=config,
    )
    return ", ".join(path.name for path in write_report(run, out))


def _models(inputs: Inputs, stages: Sequence[str] = _MODELS) -> list[Path]:
    """The checkpoints of those of these stages that ran, in their order."""
    return [inputs[name] / "checkpoint" for name in stages if name in inputs]


def _heldout(inputs: Inputs) -> list[str]:
    return [document.text for document in read_documents(inputs["corpus"] / "heldout.jsonl")]


def _trained(out: Path) -> str:
    """A training stage in a few words. The loss is the mean over its last steps: the last line of metrics says less."""
    result = read_json(out / "result.json")
    said = [f"{result['steps']:,} steps", f"{count(result['tokens'])} tokens", f"loss {result['loss']:.3f}"]
    return ", ".join([*said, f"held out {result['heldout_loss']:.3f}"] if "heldout_loss" in result else said)
