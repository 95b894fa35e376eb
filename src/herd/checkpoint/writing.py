"""Save a model in any of the three formats, in one pass over its tensors.

Everything about the files but the weights (names, shapes, number formats, offsets) is planned from the config first;
then tensors are taken one by one, laid out as the format wants, cast or quantised slab by slab, and written to their
places. What is written appears under its name only when it is complete.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from herd.architecture import LlamaConfig, Rule, stored_tensors, tensor_shapes
from herd.checkpoint.gguf import GgufWriter
from herd.checkpoint.gguf_config import config_to_gguf, rope_divisors
from herd.checkpoint.hf_config import config_to_hf
from herd.checkpoint.layout import stored_blocks, stored_shape
from herd.checkpoint.meta_config import config_to_meta, sidecar
from herd.checkpoint.mixes import MIXES, gguf_type, rounding_of
from herd.checkpoint.numbers import BLOCKS, PLAIN, Array, name_of
from herd.checkpoint.reading import Checkpoint
from herd.checkpoint.safetensors import SafetensorsWriter
from herd.checkpoint.shards import check_divisible, shard_shapes, shard_slice
from herd.checkpoint.tensorfile import StoredTensor
from herd.checkpoint.torchzip import TorchWriter
from herd.errors import HerdError, UsageError
from herd.files import atomic_dir, atomic_write, write_json
from herd.ggufmeta import MAGIC as GGUF_MAGIC
from herd.ggufmeta import MetadataValue
from herd.progress import track

if TYPE_CHECKING:
    from herd.tokenizer import Tokenizer

__all__ = ["save"]

Tensors = Mapping[str, Array] | Iterable[tuple[str, Array]]
# What may be replaced by a new checkpoint of the same name: only another checkpoint, known by its shape and weights.
_CHECKPOINT_FILES = (("config.json", "*.safetensors"), ("params.json", "consolidated.*.pth"))


def save(
    path: str | Path,
    config: LlamaConfig,
    tensors: Tensors,
    *,
    format: str = "hf",
    dtype: str | None = None,
    tokenizer: Tokenizer | None = None,
    metadata: Mapping[str, str] | None = None,
    importance: Mapping[str, npt.NDArray[np.float32]] | None = None,
    max_shard_bytes: float = 5e9,
    shards: int = 1,
    label: str | None = None,
) -> Path:
    """Write a model and return its path. An existing checkpoint of that name is replaced at the last moment.

    Parameters
    - `tensors`: canonical names to arrays, as a mapping (an open Checkpoint, a state dictionary) or as pairs in any
      order. Each is taken once; missing, unknown and wrongly shaped ones are errors.
    - `format`: "hf" or "meta" (`path` is a directory) or "gguf" (a file).
    - `dtype`: "f32", "bf16", "f16", for GGUF also one of `herd.checkpoint.mixes.MIXES`. None keeps the tensors' own;
      pairs then share the first one's.
    - `importance`: for quantising, canonical names to what the squared errors of a matrix' columns weigh, [in], of
      stacked experts [E, in].
    - `tokenizer`: its files, or its GGUF metadata, are written along.
    - `metadata`: text to keep with the weights (safetensors header, GGUF "general.…" keys such as "name").
    - `max_shard_bytes`: size of one safetensors file; `shards`: number of Meta's model-parallel files.
    - `label`: show a progress bar of this name on a terminal.

    Raises UsageError for what the format cannot express, HerdError for wrong tensors.
    """
    path = Path(path)
    formats: dict[str, Callable[..., None]] = {"hf": _save_hf, "meta": _save_meta, "gguf": _save_gguf}
    if format not in formats:
        raise UsageError("unknown checkpoint format", value=format, allowed=", ".join(formats))
    _check_dtype(dtype, format)
    _check_target(path, format)
    feed = _Feed(config, tensors, dtype, label, importance or {})
    options = {"hf": max_shard_bytes, "meta": shards, "gguf": dtype}
    formats[format](path, feed, tokenizer, dict(metadata or {}), options[format])
    return path


class _Feed:
    """The tensors on their way in: their number formats for the plan, then groups that make up stored tensors."""

    def __init__(
        self,
        config: LlamaConfig,
        tensors: Tensors,
        dtype: str | None,
        label: str | None,
        importance: Mapping[str, npt.NDArray[np.float32]],
    ) -> None:
        self.config = config
        self.importance = importance
        self._label = label
        self.shapes = tensor_shapes(config)
        self._pairs: Iterator[tuple[str, Array]] | None = None
        self._mapping: Mapping[str, Array] = {}
        if isinstance(tensors, Mapping):
            self._mapping = tensors
            self._check_names(tensors)
            self.types = {name: dtype or _type_of(tensors, name) for name in self.shapes}
        else:
            self._pairs = iter(tensors)
            if dtype is None:
                first = next(self._pairs, None)
                if first is None:
                    raise HerdError("there are no tensors to save")
                dtype = name_of(first[1])
                self._pairs = _chain(first, self._pairs)
            self.types = dict.fromkeys(self.shapes, dtype)

    def main_type(self) -> str:
        """The format most weights have."""
        count: dict[str, int] = {}
        for name, kind in self.types.items():
            count[kind] = count.get(kind, 0) + math.prod(self.shapes[name])
        return max(count, key=lambda kind: count[kind])

    def groups(self, rules: list[Rule]) -> Iterator[tuple[Rule, list[Array]]]:
        """Every rule once, with the arrays of its parts."""
        groups = self._groups(rules)
        return groups if self._label is None else track(groups, total=len(rules), label=self._label)

    def _groups(self, rules: list[Rule]) -> Iterator[tuple[Rule, list[Array]]]:
        """From pairs in any order, holds back only parts whose partners have not come yet."""
        if self._pairs is None:
            for rule in rules:
                yield rule, [self._checked(name, self._mapping[name]) for name in rule.parts]
            return
        of = {name: rule for rule in rules for name in rule.parts}
        waiting: dict[str, Array] = {}
        left = set(self.shapes)
        for name, array in self._pairs:
            if name not in left:
                what = "this tensor came twice" if name in self.shapes else "this tensor is no part of the model"
                raise HerdError(what, value=name)
            left.remove(name)
            waiting[name] = self._checked(name, array)
            rule = of[name]
            if all(part in waiting for part in rule.parts):
                yield rule, [waiting.pop(part) for part in rule.parts]
        if left:
            raise HerdError("tensors of the model are missing", value=sorted(left)[:3])

    def _checked(self, name: str, array: Array) -> Array:
        if array.shape != self.shapes[name]:
            raise HerdError(
                f"{name} has the wrong shape", value=list(array.shape), allowed=str(list(self.shapes[name]))
            )
        name_of(array)
        return array

    def _check_names(self, tensors: Mapping[str, Array]) -> None:
        for name in self.shapes:
            if name not in tensors:
                raise HerdError("a tensor of the model is missing", value=name)
        for name in tensors:
            if name not in self.shapes:
                raise HerdError("this tensor is no part of the model", value=name)


def _save_hf(path: Path, feed: _Feed, tokenizer: Tokenizer | None, metadata: dict[str, str], limit: float) -> None:
    config, rules = feed.config, stored_tensors("hf", feed.config)
    data = config_to_hf(config, feed.main_type())
    if tokenizer is not None:
        data |= _token_ids(tokenizer)
    plan = [_planned(rule, feed, feed.shapes) for rule in rules]
    files = _split(plan, limit)
    with atomic_dir(path) as directory:
        home = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
        # "format": "pt" is what transformers insists on.
        sinks = {
            name: SafetensorsWriter(directory / name, tensors, {"format": "pt", **metadata})
            for name, tensors in files.items()
        }
        for rule, parts in feed.groups(rules):
            sinks[home[rule.stored]].put(rule.stored, stored_blocks(rule, parts, config.head_dim))
        for sink in sinks.values():
            sink.finish()
        if len(files) > 1:
            total = sum(tensor.nbytes for tensor in plan)
            index = {"metadata": {"total_size": total}, "weight_map": home}
            write_json(directory / "model.safetensors.index.json", index)
        write_json(directory / "config.json", data)
        if tokenizer is not None:
            write_json(directory / "generation_config.json", _token_ids(tokenizer))
            tokenizer.save(directory)


def _save_meta(path: Path, feed: _Feed, tokenizer: Tokenizer | None, metadata: dict[str, str], shards: int) -> None:
    config = feed.config
    params = config_to_meta(config)
    check_divisible(config, shards)
    rules = stored_tensors("meta", config)
    shapes = shard_shapes(feed.shapes, config, shards)
    plan = [_planned(rule, feed, shapes) for rule in rules]
    shared = {}
    if config.tied_embeddings:
        # Meta's code wants an output head by name; tied, it is the embedding's storage once more.
        embedding = next(tensor for tensor in plan if tensor.name == "tok_embeddings.weight")
        if shards > 1 and embedding.shape[1] != config.dim:
            raise UsageError("an embedding cut by width cannot be the output head too", value=shards, allowed="1 shard")
        plan.append(StoredTensor("output.weight", embedding.type_name, embedding.shape))
        shared = {"output.weight": "tok_embeddings.weight"}
    with atomic_dir(path) as directory:
        sinks = [TorchWriter(directory / f"consolidated.{s:02d}.pth", plan, shared) for s in range(shards)]
        for rule, parts in feed.groups(rules):
            for shard, sink in enumerate(sinks):
                cut = [
                    part[shard_slice(name, part.shape, config, shard, shards)]
                    for name, part in zip(rule.parts, parts, strict=True)
                ]
                sink.put(rule.stored, stored_blocks(rule, cut, config.head_dim))
        for sink in sinks:
            sink.finish()
        write_json(directory / "params.json", params)
        write_json(directory / "herd.json", sidecar(config) | ({"metadata": metadata} if metadata else {}))
        if tokenizer is not None:
            _save_meta_tokenizer(tokenizer, directory)


def _save_meta_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Meta's tokenizer.model; tokenizer.json for vocabularies that cannot be written so."""
    try:
        tokenizer.save(directory, layout="meta")
    except HerdError:
        tokenizer.save(directory)


def _save_gguf(
    path: Path, feed: _Feed, tokenizer: Tokenizer | None, metadata: dict[str, str], dtype: str | None
) -> None:
    config, rules = feed.config, stored_tensors("gguf", feed.config)
    head = config_to_gguf(config, dtype or feed.main_type())
    head |= {f"general.{key}": value for key, value in metadata.items()}
    head |= _vocabulary(tokenizer, config.vocab_size)
    plan = []
    for rule in rules:
        kept = _planned(rule, feed, feed.shapes)
        plan.append(StoredTensor(kept.name, gguf_type(kept.name, kept.shape, kept.type_name, config), kept.shape))
    divisors = None
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        divisors = rope_divisors(config)
        plan.insert(1, StoredTensor("rope_freqs.weight", "f32", divisors.shape))
    types = {tensor.name: tensor.type_name for tensor in plan}
    with atomic_write(path) as out:
        sink = GgufWriter(out, head, plan)
        if divisors is not None:
            sink.put("rope_freqs.weight", [divisors])
        for rule, parts in feed.groups(rules):
            importance = feed.importance.get(rule.parts[0])
            rounding = rounding_of(types[rule.stored], dtype)
            sink.put(rule.stored, stored_blocks(rule, parts, config.head_dim), importance, rounding)
        sink.finish()


def _planned(rule: Rule, feed: _Feed, shapes: Mapping[str, tuple[int, ...]]) -> StoredTensor:
    kinds = {feed.types[name] for name in rule.parts}
    # Parts of one stored tensor that differ in format share the one that holds them all.
    kind = kinds.pop() if len(kinds) == 1 else "f32"
    return StoredTensor(rule.stored, kind, stored_shape(rule, shapes))


def _split(plan: list[StoredTensor], limit: float) -> dict[str, list[StoredTensor]]:
    """File name → tensors, in order, each file of at most `limit` bytes unless a single tensor is larger."""
    files: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in plan:
        if files[-1] and size + tensor.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.nbytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": tensors for i, tensors in enumerate(files, 1)}


def _type_of(tensors: Mapping[str, Array], name: str) -> str:
    """The format to keep for a tensor of a mapping. Blocks are not carried over: they come as float32."""
    if not isinstance(tensors, Checkpoint):
        return name_of(tensors[name])
    kind = tensors.type_name(name)
    if kind in BLOCKS:
        return "f32"
    if kind == "f32" and tensors.format == "gguf":
        return _widened_from(tensors, name)
    return kind


def _widened_from(checkpoint: Checkpoint, name: str) -> str:
    """GGUF widens vectors and routers to float32. They go back to the matrices' format when nothing is lost by it."""
    kind = checkpoint.type_name("layers.0.attention.wq.weight")
    widened = len(checkpoint.shape(name)) == 1 or name.endswith("moe.router.weight")
    if not widened or kind not in ("bf16", "f16"):
        return "f32"
    array = checkpoint[name]
    with np.errstate(over="ignore"):
        exact = array.astype(PLAIN[kind]).astype(np.float32)
    return kind if np.array_equal(exact, array) else "f32"


def _chain(first: tuple[str, Array], rest: Iterator[tuple[str, Array]]) -> Iterator[tuple[str, Array]]:
    yield first
    yield from rest


def _token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": sorted(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_id,
    }


def _vocabulary(tokenizer: Tokenizer | None, size: int) -> dict[str, MetadataValue]:
    """The tokenizer's GGUF metadata, filled up with unused tokens where the embedding has more rows."""
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    found: dict[str, Any] = dict(tokenizer.gguf_metadata())
    tokens = list(found["tokenizer.ggml.tokens"])
    spare = size - len(tokens)
    if spare < 0:
        raise HerdError(
            "the tokenizer has more tokens than the embedding has rows", value=len(tokens), allowed=f"up to {size}"
        )
    if spare:
        # Names and type (5: unused) as llama.cpp's converter gives them.
        found["tokenizer.ggml.tokens"] = tokens + [f"[PAD{index}]" for index in range(len(tokens), size)]
        for key, filler in (("tokenizer.ggml.token_type", 5), ("tokenizer.ggml.scores", -1000.0)):
            if key in found:
                found[key] = [*found[key], *([filler] * spare)]
    return found


def _check_dtype(dtype: str | None, fmt: str) -> None:
    """UsageError unless format `fmt` can store `dtype`; None means "as the source has it"."""
    allowed = [*PLAIN, *MIXES] if fmt == "gguf" else [*PLAIN]
    if dtype is not None and dtype not in allowed:
        fix = f"herd quantize SRC DST.gguf --type {dtype}" if dtype in MIXES else None
        raise UsageError(f"format {fmt!r} cannot store this dtype", value=dtype, allowed=", ".join(allowed), fix=fix)


def _check_target(path: Path, fmt: str) -> None:
    """Never replace something that is no checkpoint: a mistyped target must not cost a directory of other files."""
    if not path.exists():
        return
    if fmt == "gguf":
        if path.is_dir():
            raise UsageError(
                "a GGUF checkpoint is a file, this is a directory", value=path, fix=f"use {path}/model.gguf"
            )
        with path.open("rb") as file:
            if file.read(len(GGUF_MAGIC)) not in (GGUF_MAGIC, b""):
                raise UsageError("this file exists and is not a GGUF file; it was left alone", value=path)
        return
    if not path.is_dir():
        raise UsageError(f"format {fmt!r} makes a directory, this is a file", value=path)
    entries = list(path.iterdir())
    known = any((path / shape).is_file() and any(path.glob(weights)) for shape, weights in _CHECKPOINT_FILES)
    if entries and not known:
        raise UsageError("this directory exists and is not a checkpoint; it was left alone", value=path)
    if folders := [entry.name for entry in entries if entry.is_dir() and entry.name != "original"]:
        raise UsageError(
            "this directory holds more than a checkpoint; it was left alone", value=path, fix=f"move {folders[0]} away"
        )
