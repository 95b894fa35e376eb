"""`herd quantize`: any checkpoint as a GGUF file of few bits per weight."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from herd.cli.output import emit, table

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_CALIBRATION_TOKENS = 32_768
_WINDOW = 512


def command(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Model: directory, GGUF, run, or pulled OWNER/NAME.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="New GGUF file.")],
    mix: Annotated[
        str, typer.Option("--type", help="Format or mix: q4_k_m, q5_k_m, q6_k, q8_0, q4_0, iq4_xs, q3_k_m, int4_g32, …")
    ] = "q4_k_m",
    imatrix: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A calibration text: errors in weights that it uses much count more (needs torch)."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it is a GGUF file already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Quantise a model into a GGUF file, one tensor in memory at a time.

    Examples:

        herd quantize runs/pocket pocket-q5_0.gguf --type q5_0

        herd quantize meta-llama/Llama-3.2-1B model-q4_k_m.gguf

        herd quantize Llama-3.1-8B model-q3_k_m.gguf --type q3_k_m --imatrix calibration.txt
    """
    from herd import checkpoint
    from herd.checkpoint.mixes import MIXES
    from herd.checkpoint.numbers import PLAIN
    from herd.errors import UsageError, near

    mix = mix.lower()  # llama.cpp writes them in capitals
    if mix not in (*MIXES, *PLAIN):
        raise UsageError("no such format or mix", value=mix, allowed=near(mix, [*MIXES, *PLAIN]))
    if dst.exists() and not force:
        raise UsageError("the destination exists", value=dst, fix="choose another name, or add --force")
    if imatrix is not None:
        _check_calibration(imatrix, mix)
    importance = None if imatrix is None else _importance(src, imatrix)
    start = time.perf_counter()
    checkpoint.convert(src, dst, to="gguf", dtype=mix, importance=importance)
    result = _result(dst, mix, time.perf_counter() - start)
    emit(result, as_json, lambda: _show(result))


def _check_calibration(text: Path, mix: str) -> None:
    from herd.checkpoint.mixes import MIXES, weighs_errors
    from herd.errors import UsageError

    if not weighs_errors(mix):
        raise UsageError(
            "importance has no say in how this type rounds",
            value=mix,
            allowed=", ".join(filter(weighs_errors, MIXES)),
            fix="leave --imatrix out, or choose another --type",
        )
    if text.is_dir() or not text.exists():
        raise UsageError(
            "there is no such calibration text",
            value=text,
            fix="name a file of text like that which the model will be used on",
        )


def _importance(src: str, text: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Mean squares of the inputs of every matrix, over at most the first 32,768 tokens of a text."""
    try:
        import torch
    except ImportError:
        from herd.errors import MissingDependency

        raise MissingDependency("torch", extra="train") from None
    from herd import checkpoint, tokenizer
    from herd.errors import FileFormatError, UsageError
    from herd.model import input_squares, load
    from herd.progress import track

    place = checkpoint.resolve(src)
    words = tokenizer.load(place)
    try:
        ids = words.encode(text.read_text(encoding="utf-8"))[:_CALIBRATION_TOKENS]
    except UnicodeDecodeError as error:
        raise FileFormatError("is not UTF-8 text", file=text, offset=error.start) from None
    if len(ids) < 2:
        raise UsageError("the calibration text is empty", value=text)
    model = load(place, dtype=torch.float32).eval()
    room = min(_WINDOW, model.config.context_length) - 1
    windows = [[words.bos_id, *ids[i : i + room]] for i in range(0, len(ids), room)]
    return input_squares(model, track(windows, total=len(windows), label="calibrating"))


def _result(path: Path, mix: str, seconds: float) -> dict[str, Any]:
    from herd.checkpoint.gguf import GgufFile

    file = GgufFile(path)
    try:
        types: dict[str, dict[str, int]] = {}
        for tensor in file.tensors.values():
            entry = types.setdefault(tensor.type_name, {"tensors": 0, "weights": 0, "bytes": 0})
            entry["tensors"] += 1
            entry["weights"] += tensor.count
            entry["bytes"] += tensor.nbytes
    finally:
        file.close()
    weights = sum(entry["weights"] for entry in types.values())
    return {
        "path": path,
        "type": mix,
        "bytes": path.stat().st_size,
        "bits_per_weight": 8 * sum(entry["bytes"] for entry in types.values()) / weights,
        "seconds": seconds,
        "formats": types,
    }


def _show(result: dict[str, Any]) -> None:
    rows = [
        [name, f"{entry['tensors']:,}", f"{entry['weights']:,}", f"{entry['bytes'] / 1e6:,.1f}"]
        for name, entry in sorted(result["formats"].items(), key=lambda item: -item[1]["bytes"])
    ]
    print(table(["format", "tensors", "weights", "MB"], rows))
    print(
        f"{result['path']}  {result['type']}, {result['bytes'] / 1e6:,.1f} MB, "
        f"{result['bits_per_weight']:.2f} bits per weight, in {result['seconds']:.1f} s"
    )
