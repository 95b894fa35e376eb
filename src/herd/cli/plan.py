"""`herd plan`: a parallel layout for a training run, with the memory and the time that it takes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from herd.cli.options import shape_of, size_bytes
from herd.cli.output import emit, table


def command(
    model: Annotated[str, typer.Argument(help="A release of `herd list`, or a checkpoint whose weights are not read.")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs, in nodes of eight.")],
    seq: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")],
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step, of all GPUs together.")],
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Of a GPU, such as 80GiB (default: its).")] = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, or h100-500w (torchtitan's).")] = "h100",
    precision: Annotated[Literal["bf16", "fp8"], typer.Option(help="Of matrix products.")] = "bf16",
    loss: Annotated[Literal["chunked", "whole"], typer.Option(help="How many logits are held at once.")] = "chunked",
    trainer: Annotated[
        Literal["herd", "published"],
        typer.Option(help="Who trains: as the Llama 3 paper and torchtitan did, or Herd's own trainer."),
    ] = "published",
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor parallel ranks (default: searched).")] = None,
    cp: Annotated[int | None, typer.Option(min=1, help="Context parallel ranks.")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Pipeline ranks.")] = None,
    dp: Annotated[int | None, typer.Option(min=1, help="Data parallel ranks.")] = None,
    ep: Annotated[int | None, typer.Option(min=1, help="Expert parallel ranks, out of cp and dp.")] = None,
    schedule: Annotated[
        Literal["1f1b", "interleaved", "gpipe", "looped-bfs"] | None,
        typer.Option(help="Of the pipeline (default: the faster of the first two)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON: bytes and seconds.")] = False,
) -> None:
    """Find a parallel layout that fits, and predict its memory, communication, bubble, step time and MFU.

    The mesh is [TP, CP, PP, DP], innermost first. Axes that are given are checked: what does not divide is an error
    that names the nearest layout that works. docs/plan.md says how far predictions were from published runs, whose
    trainers hold less than Herd's own: --trainer herd plans for that.

    Examples:

        herd plan llama3.1-405b --gpus 8192 --memory 80GiB --seq 8192 --batch-tokens 16777216

        herd plan llama3.1-8b --gpus 8 --seq 8192 --batch-tokens 1048576 --json

        herd plan llama3.1-70b --gpus 256 --seq 8192 --batch-tokens 4194304 --tp 8 --trainer herd

        herd plan llama4-scout-17b-16e --gpus 512 --seq 8192 --batch-tokens 4194304 --ep 16
    """
    from herd.errors import UsageError
    from herd.train.plan import Job, gpu_named, make_plan
    from herd.train.plan.report import describe

    card = gpu_named(gpu)
    job = Job(shape_of(model), seq, batch_tokens, precision, loss, trainer)
    each = card.memory if memory is None else size_bytes(memory)
    if each < 1 << 20:
        raise UsageError("--memory is in bytes without a unit", value=memory, fix=f"--memory {memory}GiB")
    axes = {"tp": tp, "cp": cp, "pp": pp, "dp": dp, "ep": ep}
    fixed = {axis: ranks for axis, ranks in axes.items() if ranks is not None}
    data = describe(make_plan(job, gpus, each, card, fixed, schedule))
    asked = {"model": model, "gpus": gpus, "gpu": card.name, "memory_limit": each, "seq": seq}
    data |= asked | {"batch_tokens": batch_tokens}
    emit(data, as_json, lambda: _show(data))


def _show(data: dict[str, Any]) -> None:
    settings, speed, time = data["settings"], data["speed"], data["time"]
    print(
        f"{data['model']} on {data['gpus']:,} {data['gpu']} GPUs, "
        f"{data['batch_tokens']:,} tokens a step in sequences of {data['seq']:,}\n\n"
        f"layout       {_axes(data)}\n"
        f"pipeline     {_pipeline(data)}\n"
        f"micro-batch  {settings['micro_batch']} x {data['seq']:,} tokens, {settings['micro_batches']:,} in a step\n"
        f"recompute    {settings['recompute']}\n"
        f"sharded      {_SHARDED[settings['sharding']]}\n"
        f"trainer      {_TRAINERS[settings['trainer']]}\n\n"
        f"step         {time['seconds']:.2f} s, {speed['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU, "
        f"{speed['tflops_per_gpu']:.0f} TFLOP/s, MFU {speed['mfu']:.1%}\n"
    )
    parts = data["memory"]["parts"]
    rows = [[name, _gib(size)] for name, size in parts.items()]
    rows.append([f"of {_gib(data['memory_limit'])}", _gib(data["memory"]["needed"])])
    print(table(["memory of the fullest GPU", "GiB"], rows), end="\n\n")
    rows = [[schedule, *map(_gib, needed.values())] for schedule, needed in data["memory_by_schedule"].items()]
    print(table(["memory by schedule, GiB", "none", "selective", "full"], rows), end="\n\n")
    rows = [
        [axis, f"{row['ranks']:,}", f"{row['in_node']:,}", f"{row['bytes'] / 1e9:,.1f}", f"{row['seconds']:.2f}"]
        for axis, row in data["communication"].items()
        if row["ranks"] > 1
    ]
    if rows:
        print(table(["axis", "ranks", "in a node", "GB a step", "waits, s"], rows), end="\n\n")
    own = {name: time["parts"][name] for name in ("compute", "bubble", "optimizer")}
    print(table(["other time", "s"], [[name, f"{seconds:.2f}"] for name, seconds in own.items()]))
    fastest = data["fastest"]
    if fastest["layout"] != data["layout"]:
        print(f"\nwith more context ranks: {_axes(fastest)}, {fastest['seconds']:.2f} s (see docs/plan.md)")


_TRAINERS = {"herd": "Herd's own", "published": "as in published runs (--trainer herd: Herd's own)"}
_SHARDED = {
    "optimizer": "optimiser state (ZeRO-1)",
    "gradients": "optimiser state and gradients (ZeRO-2)",
    "parameters": "optimiser state, gradients and parameters (ZeRO-3)",
}


def _axes(data: dict[str, Any]) -> str:
    text = " ".join(f"{axis}={ranks}" for axis, ranks in data["layout"].items())
    return text if data["expert_parallel"] == 1 else f"{text} ep={data['expert_parallel']}"


def _pipeline(data: dict[str, Any]) -> str:
    settings = data["settings"]
    if data["layout"]["pp"] == 1:
        return "none"
    chunks = f"{settings['virtual']} chunk{'' if settings['virtual'] == 1 else 's'} a rank"
    return f"{settings['schedule']}, {chunks}, bubble {data['time']['bubble']:.1%}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"
