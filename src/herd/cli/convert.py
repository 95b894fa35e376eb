"""`herd convert`: a checkpoint into another format."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Annotated

import typer

from herd.cli.output import emit


def command(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Model: directory, GGUF, run, or pulled OWNER/NAME.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="New directory, or new file for GGUF.")],
    to: Annotated[str, typer.Option(help="Format to write: hf, meta or gguf.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="f32, bf16, f16; for GGUF also q8_0, q4_k_m, …. Default: as the source has it, bit for bit."),
    ] = None,
    shards: Annotated[int, typer.Option(min=1, help="Model-parallel files of the Meta format.")] = 1,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run both models on fixed tokens and print the largest logit difference.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it is a checkpoint already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Convert a checkpoint between the Hugging Face, Meta and GGUF formats, one tensor in memory at a time.

    Examples:

        herd convert runs/pocket pocket.gguf --to gguf --dtype q8_0

        herd convert Meta-Llama-3-8B Llama-3-8B-hf --to hf --verify

        herd convert model.gguf model-meta --to meta --shards 2
    """
    from herd import checkpoint
    from herd.errors import MissingDependency, UsageError

    if verify and importlib.util.find_spec("torch") is None:
        raise MissingDependency("torch", extra="train")
    if dst.exists() and not force:
        raise UsageError("the destination exists", value=dst, fix="choose another name, or add --force")
    start = time.perf_counter()
    path = checkpoint.convert(src, dst, to=to, dtype=dtype, shards=shards)
    seconds = time.perf_counter() - start
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    size = sum(file.stat().st_size for file in files)
    difference = _difference(src, path) if verify else None
    result = {"path": path, "format": to, "bytes": size, "seconds": seconds, "largest_logit_difference": difference}

    def human() -> None:
        print(f"{path}  {to}, {size / 1e6:,.1f} MB in {seconds:.1f} s")
        if difference is not None:
            print(f"largest logit difference to {src}: {difference:.3g}")

    emit(result, as_json, human)


def _difference(src: str, path: Path) -> float:
    from herd.model import largest_difference

    return largest_difference(src, path)
