"""`herd extend`: the stages that take a model to a longer context."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, cast

import typer

from herd.cli.options import shape_of
from herd.cli.output import emit, table


def command(
    model: Annotated[str, typer.Argument(help="A checkpoint, a GGUF file, a run, or a release of `herd list`.")],
    to: Annotated[int, typer.Option(metavar="TOKENS", help="The context to reach.")],
    plan: Annotated[bool, typer.Option("--plan", help="Print the stages and train nothing.")] = False,
    method: Annotated[
        str,
        typer.Option(
            help="How RoPE is stretched: law (larger theta), card (the published thetas), ntk, linear, yarn, llama3."
        ),
    ] = "law",
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Plan the stages of training that take a model to a longer context.

    Stages follow the card of Gradient's Llama 3 8B with 4M tokens: 8, 32, 64, 128 and 512 times the model's context,
    each from the last, with its batch, steps and learning rate.

    Examples:

        herd extend llama3-8b --to 4194304 --plan

        herd extend runs/pocket --to 4096 --plan --json

        herd extend llama3-8b --to 262144 --plan --method card
    """
    from herd.errors import UsageError
    from herd.pretrain.extension import PlanMethod, plan_extension

    if not plan:
        raise UsageError("herd extend does not train yet, it plans", allowed="--plan")
    config = shape_of(model)
    stages = plan_extension(config, to, cast("PlanMethod", method))
    data: dict[str, Any] = {
        "model": model,
        "context": config.context_length,
        "rope_theta": config.rope_theta,
        "to": to,
        "method": method,
        "tokens": sum(stage.tokens for stage in stages),
        "stages": [dataclasses.asdict(stage) for stage in stages],
    }
    emit(data, as_json, lambda: _show(data))


def _show(data: dict[str, Any]) -> None:
    print(f"{data['model']}: {data['context']:,} → {data['to']:,} tokens, from theta {data['rope_theta']:.4g}\n")
    rows = []
    for stage in data["stages"]:
        scaling = stage["rope_scaling"]
        rows.append([
            f"{stage['context']:,}",
            f"{stage['rope_theta']:.4g}",
            f"{scaling['kind']} x{scaling['factor']:g}" if scaling else "none",
            f"{stage['batch']} x {stage['accumulation']}",
            f"{stage['steps']}",
            f"{stage['tokens']:,}",
            f"{stage['lr']:g}",
            stage["card"],
        ])  # fmt: skip
    print(table(["context", "theta", "scaling", "batch x accum", "steps", "tokens", "lr", "as the card's"], rows))
    print(f"\n{data['tokens']:,} tokens in all")
