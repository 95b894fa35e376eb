"""`herd inspect`: what is in a checkpoint."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from herd.cli.output import emit, table

if TYPE_CHECKING:
    from herd.checkpoint import Checkpoint

_LONGEST = 100  # characters of a metadata value on the screen


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, GGUF, run, or pulled OWNER/NAME.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor, not one layer of each kind.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Read all weights and look for values that are no numbers.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> int:
    """Show a checkpoint's format, configuration, tensors, sizes and metadata.

    Opening it already proves that the files are whole and that names, shapes and configuration agree. --check also
    reads the weights and exits with 3 if any is infinite or not a number.

    Examples:

        herd inspect runs/pocket

        herd inspect model.gguf --tensors

        herd inspect meta-llama/Llama-3.2-1B --check --json
    """
    from herd.architecture import parameter_count
    from herd.checkpoint import open_checkpoint

    with open_checkpoint(model) as checkpoint:
        rows = [_row(checkpoint, name) for name in checkpoint]
        data: dict[str, Any] = {
            "path": checkpoint.path,
            "format": checkpoint.format,
            "files": [{"name": file.name, "bytes": file.stat().st_size} for file in checkpoint.files],
            "config": checkpoint.config.to_dict(),
            "parameters": parameter_count(checkpoint.config),
            "tensor_bytes": sum(row["bytes"] for row in rows),
            "bytes_by_type": _by_type(rows),
            "tensors": rows,
            "skipped": list(checkpoint.skipped),
            "metadata": dict(checkpoint.metadata),
        }
        if check:
            data["not_finite"] = _not_finite(checkpoint)
    emit(data, as_json, lambda: _print(data, every_tensor=tensors))
    return 3 if data.get("not_finite") else 0


def _row(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    from herd.checkpoint.numbers import stored_bytes

    shape, kind = checkpoint.shape(name), checkpoint.type_name(name)
    return {"name": name, "type": kind, "shape": list(shape), "bytes": stored_bytes(kind, shape)}


def _by_type(rows: list[dict[str, Any]]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row["type"]] = sizes.get(row["type"], 0) + row["bytes"]
    return sizes


def _not_finite(checkpoint: Checkpoint) -> dict[str, int]:
    """Tensor name → number of weights that are infinite or not a number, where there are any."""
    import numpy as np

    from herd.progress import track

    found = {}
    for name in track(list(checkpoint), label="reading weights"):
        weights = checkpoint[name]
        if bad := int(weights.size - np.isfinite(weights).sum()):
            found[name] = bad
    return found


def _print(data: dict[str, Any], *, every_tensor: bool) -> None:
    files = data["files"]
    print(f"{data['path']}  format {data['format']}, {len(files)} weight file{'s' if len(files) != 1 else ''}")
    types = ", ".join(f"{kind} {size / 1e6:,.1f} MB" for kind, size in data["bytes_by_type"].items())
    print(f"{data['parameters']:,} parameters in {len(data['tensors'])} tensors: {types}\n")
    print(table(["setting", "value"], [[key, _short(value)] for key, value in data["config"].items()]), end="\n\n")
    # Layers repeat; the first of each kind stands for the others.
    rows = [row for row in data["tensors"] if every_tensor or not _repeats(row["name"], data["config"])]
    lines = [[r["name"], r["type"], " × ".join(map(str, r["shape"])), f"{math.prod(r['shape']):,}"] for r in rows]
    print(table(["tensor", "type", "shape", "weights"], lines), end="\n\n")
    if len(rows) < len(data["tensors"]):
        print(f"… and {len(data['tensors']) - len(rows)} tensors of the other layers (--tensors lists all)\n")
    print(table(["metadata", "value"], [[key, _short(value)] for key, value in data["metadata"].items()]))
    if data["skipped"]:
        print(f"\nleft out, no part of the text model: {len(data['skipped'])} tensors, such as {data['skipped'][0]}")
    if "not_finite" in data:
        bad = data["not_finite"]
        print(f"\nall weights are finite: {'no, ' + ', '.join(bad) if bad else 'yes'}")


def _repeats(name: str, config: dict[str, Any]) -> bool:
    """True for the layers after the first dense and the first mixture one."""
    kinds = config["moe"]["interleave"] if config["moe"] else 1
    return name.startswith("layers.") and int(name.split(".")[1]) >= kinds


def _short(value: object) -> str:
    """A value in one line, without control characters."""
    if isinstance(value, list) and len(value) > 8:
        text = f"{len(value):,} items: {value[:4]}…"
    else:
        text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
