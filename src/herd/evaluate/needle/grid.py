"""Running a needle grid: prompts in, one line of cells.jsonl for each cell, results and heat maps at the end.

Within a length the deepest needle comes first: the prompts of the others begin with what its prompt held, so that the
engine computes only what follows their needles. A grid that was interrupted goes on after its last whole line.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herd.errors import FileFormatError, UsageError
from herd.evaluate.needle.config import NeedleConfig
from herd.evaluate.needle.prompts import NeedlePrompt, PromptMaker
from herd.evaluate.statistics import proportion
from herd.files import atomic_write, parse_json, write_json
from herd.progress import track

if TYPE_CHECKING:
    from herd.engine import LLM, Completion

VERSION = 1  # of cells.jsonl and needle.json
CELLS, RESULTS = "cells.jsonl", "needle.json"


def run(
    config: NeedleConfig, model: LLM, out_dir: str | Path, *, loading: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Ask the whole grid, greedily, and write cells.jsonl and needle.json into `out_dir`; returns the latter's data.

    loading: how the model was loaded, which is written down and must be the same when a grid is taken up again.
    Raises UsageError for lengths that the model or the prompt's other parts leave no room for, and for an `out_dir`
    that holds a grid of other settings; FileFormatError for a damaged cells.jsonl."""
    prompts = PromptMaker(model.tokenizer, config)
    _check_lengths(config, prompts, model.context)
    header = {
        "version": VERSION,
        "model": {"path": str(model.path), "files": _fingerprint(model.path)},
        "loading": dict(loading or {}),
        "config": config.model_dump(mode="json"),
        "haystack": {"sha256": prompts.haystack.sha256, "text_tokens": prompts.haystack.text_tokens},
    }
    path = Path(out_dir) / CELLS
    cells = _resume(path, header)
    order = [(length, depth) for length in config.lengths for depth in reversed(config.depths)]
    missing = [cell for cell in order if cell not in cells]
    with path.open("ab") as file:
        for length, depth in track(missing, label="needle grid"):
            cell = _ask(config, model, prompts, length, depth)
            cells[length, depth] = cell
            file.write(_line(cell))
            file.flush()
            os.fsync(file.fileno())
    results = _results(header, config, cells)
    write_json(Path(out_dir) / RESULTS, results)
    return results


def _check_lengths(config: NeedleConfig, prompts: PromptMaker, context: int) -> None:
    prompts.needed(config.lengths[0])  # raises where it leaves no room for a haystack
    needed = prompts.needed(config.lengths[-1])
    if needed > context:
        raise UsageError(
            f"the longest prompts and their answers take {needed} tokens, the model's context is {context}",
            value=config.lengths[-1],
            fix=f"lengths up to {config.lengths[-1] - (needed - context)}, or a model with a longer context",
        )


def _ask(config: NeedleConfig, model: LLM, prompts: PromptMaker, length: int, depth: float) -> dict[str, Any]:
    asked = [prompts.make(length, depth, sample) for sample in range(config.samples)]
    completions = model.generate([prompt.ids for prompt in asked], max_tokens=prompts.room, temperature=0.0)
    samples = [_sample(prompt, said) for prompt, said in zip(asked, completions, strict=True)]
    return {"length": length, "depth": depth, "samples": samples}


def _sample(prompt: NeedlePrompt, completion: Completion) -> dict[str, Any]:
    return {
        "numbers": list(prompt.numbers),
        "cities": list(prompt.cities),
        "found": score(prompt, completion.token_ids, completion.text),
        "said": completion.text,
        "prompt_tokens": len(prompt.ids),
        "places": list(prompt.places),
    }


def score(prompt: NeedlePrompt, token_ids: list[int], text: str) -> list[bool]:
    """For each number asked for, whether the answer has it.

    One number: the answer's tokens are the number's, to the last; as the model chose each of them greedily, this is
    EasyContext's test of the most likely token at every place. Several: each counts that stands in the text by itself.
    """
    if prompt.answer:
        return [token_ids[: len(prompt.answer)] == prompt.answer]
    said = set(re.findall("[0-9]+", text))
    return [str(number) in said for number in prompt.numbers]


def _resume(path: Path, header: dict[str, Any]) -> dict[tuple[int, float], dict[str, Any]]:
    """The cells that are there already; without any, a file with nothing but the header."""
    if not path.exists():
        with atomic_write(path) as file:  # so that its first line is whole
            file.write(_line(header))
        return {}
    first, *lines = path.read_bytes().splitlines(keepends=True) or [b""]
    _check_header(parse_json(first, path), json.loads(_line(header)), path)
    if lines and not lines[-1].endswith(b"\n"):  # interrupted while it was written
        lines.pop()
        os.truncate(path, len(first) + sum(map(len, lines)))
    cells = [parse_json(line, path) for line in lines]
    for cell in cells:
        if not _is_cell(cell, header["config"]):
            raise FileFormatError("a line is no cell of this grid", file=path, value=cell)
    return {(cell["length"], cell["depth"]): cell for cell in cells}


def _check_header(found: object, wanted: dict[str, Any], path: Path) -> None:
    """A grid goes on only with the settings it was begun with."""
    if not isinstance(found, dict):
        raise FileFormatError("does not begin as cells of a needle grid", file=path, value=found)
    for key, value in wanted.items():
        before = found.get(key)
        if before == value:
            continue
        if isinstance(before, dict) and isinstance(value, dict):
            name = next(n for n in (*value, *before) if before.get(n) != value.get(n))
            key, before, value = f"{key}.{name}", before.get(name), value.get(name)
        raise UsageError(
            f"{path} was begun with another {key}",
            value=before,
            allowed=f"what it is now, {json.dumps(value)[:160]}",
            fix="another --out, or delete the file",
        )


def _is_cell(cell: object, config: Mapping[str, Any]) -> bool:
    """Whether a line of the file is a cell that this grid could have."""
    match cell:
        case {"length": length, "depth": depth, "samples": [*samples]}:
            asked = config["ask"] or config["needles"]
            right = (
                isinstance(sample, dict)
                and isinstance(found := sample.get("found"), list)
                and [type(each) for each in found] == [bool] * asked
                for sample in samples
            )
            known = length in config["lengths"] and depth in config["depths"]
            return known and len(samples) == config["samples"] and all(right)
    return False


def _line(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def _fingerprint(path: Path) -> str:
    """Of a model's files by name, size and time: a model trained anew in the same place is another."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stated = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return hashlib.sha256(repr(stated).encode()).hexdigest()[:16]


def _results(
    header: dict[str, Any], config: NeedleConfig, cells: Mapping[tuple[int, float], dict[str, Any]]
) -> dict[str, Any]:
    grid = [(length, depth, cells[length, depth]) for length in config.lengths for depth in config.depths]
    whole = [all(sample["found"]) for _, _, cell in grid for sample in cell["samples"]]
    return header | {
        "overall": _share(cell for _, _, cell in grid),
        "all_found": asdict(proportion(sum(whole), len(whole))),
        "by_length": [
            {"length": length, **_share(cell for at, _, cell in grid if at == length)} for length in config.lengths
        ],
        "by_depth": [
            {"depth": depth, **_share(cell for _, at, cell in grid if at == depth)} for depth in config.depths
        ],
        "cells": [{"length": length, "depth": depth, **_share([cell])} for length, depth, cell in grid],
    }


def _share(cells: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Numbers found of those asked for, with Wilson's interval."""
    found = list(_found(cells))
    return asdict(proportion(sum(found), len(found)))


def _found(cells: Iterable[dict[str, Any]]) -> Iterator[bool]:
    for cell in cells:
        for sample in cell["samples"]:
            yield from sample["found"]
