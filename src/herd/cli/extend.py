"""`herd extend`: a model for a longer context, stage by stage."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from herd.cli.options import shape_of
from herd.cli.output import console, emit, table


def command(
    model: Annotated[str, typer.Argument(help="A checkpoint, a GGUF file, a run, or with --plan a release's name.")],
    to: Annotated[int, typer.Option(metavar="TOKENS", help="The context to reach.")],
    plan: Annotated[bool, typer.Option("--plan", help="Print the stages and train nothing.")] = False,
    method: Annotated[
        str,
        typer.Option(
            help="How RoPE is stretched: law (larger theta), card (the published thetas), ntk, linear, yarn, llama3."
        ),
    ] = "law",
    corpus: Annotated[
        Path | None, typer.Option(help="Folder of `herd corpus` to train on and judge by.  [default: the run's own]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the stages; an extension begun there goes on.")] = Path("extend"),
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of each stage.  [default: the plan's]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a step.  [default: the plan's]")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Rows of a forward pass on a rank.  [default: as many as hold 4,096 tokens]")
    ] = None,
    parallel: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="How the ranks of torchrun share the work, as cp=8 or context=ring; repeatable."
        ),
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw or muon.  [default: adamw]")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.  [default: the plan's]")] = None,
    muon_lr: Annotated[float | None, typer.Option(help="Learning rate of Muon.  [default: as lr]")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="The rate after the warm-up: constant or linear.  [default: constant]")
    ] = None,
    chats: Annotated[
        float | None, typer.Option(help="Share of the documents made into long chats that ask.  [default: 0]")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Share by which bits per byte of short text may rise.  [default: 0.02]")
    ] = None,
    needles: Annotated[
        float | None, typer.Option(help="Share of needles to find at each length; 0: do not ask.  [default: 1]")
    ] = None,
    lengths: Annotated[
        int | None,
        typer.Option(
            help="Lengths that needles are hidden at, evenly up to the new one; if several, the model before is asked"
            " too.  [default: 1]"
        ),
    ] = None,
    depths: Annotated[int | None, typer.Option(help="Depths at which needles lie.  [default: 11]")] = None,
    samples: Annotated[int | None, typer.Option(help="Needles at each depth.  [default: 2]")] = None,
    digits: Annotated[int | None, typer.Option(help="Digits of their numbers.  [default: 7]")] = None,
    haystack: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="Text to hide them in; may be repeated.  [default: python-stdlib]"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of the data.  [default: 0]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan or the result as JSON.")] = False,
) -> int:
    """Take a model to a longer context, in stages of training that each have to keep what the model could.

    Stages follow the card of Gradient's Llama 3 8B with 4M tokens: 8, 32, 64, 128 and 512 times the model's context,
    each from the last, with its batch, steps and learning rate, on documents that are joined to the new length. After
    each one held-out short text must be read as well as before, and numbers hidden in texts of the new length be found;
    else it stops there, says why and exits with 1. The same command continues after Ctrl-C or a crash.

    Examples:

        herd extend llama3-8b --to 4194304 --plan

        herd extend runs/pocket --to 4096 --lr 5e-4 --out runs/pocket-long

        herd extend Llama-3-8B --to 262144 --method card --corpus books --out runs/long

        torchrun --nproc-per-node 8 -m herd extend Llama-3-8B --to 262144 --parallel cp=8 --parallel context=ring
    """
    if plan:
        data = _plan(model, to, method)
        emit(data, as_json, lambda: _show(data))
        return 0
    from herd.config import parse_config
    from herd.recipe.lock import run_lock
    from herd.recipe.long_context import LongContextConfig, lengthen
    from herd.train.launch import started_ranks

    given = {
        "to": to, "method": method, "steps": steps, "batch_size": batch_size, "micro_batch": micro_batch,
        "parallel": _pairs(parallel), "optimizer": optimizer, "lr": lr, "muon_lr": muon_lr, "schedule": schedule,
        "chats": chats, "tolerance": tolerance, "needles": needles,
        "lengths": lengths, "depths": depths, "samples": samples, "digits": digits, "haystack": haystack, "seed": seed,
    }  # fmt: skip
    config = parse_config(LongContextConfig, {k: v for k, v in given.items() if v is not None}, "herd extend")
    texts = corpus or _corpus_of(model)
    try:
        with started_ranks() as ranks, run_lock(out) if ranks.leads else contextlib.nullcontext():
            state = lengthen(config, model, texts, out)
    except (KeyboardInterrupt, SystemExit) as stop:
        console().print("Stopped. The same command continues where it was.", markup=False)
        return 130 if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)
    emit(state, as_json, lambda: _show_result(state))
    return 1 if state["stopped"] and ranks.leads else 0


def _pairs(given: list[str] | None) -> dict[str, str] | None:
    """The fields of ParallelConfig that are given, as text."""
    from herd.errors import UsageError

    for pair in given or []:
        if not all(pair.partition("=")):
            raise UsageError("--parallel is no NAME=VALUE", value=pair, fix="--parallel cp=2")
    return dict(pair.split("=", 1) for pair in given) if given else None


def _plan(model: str, to: int, method: str) -> dict[str, Any]:
    from herd.pretrain.extension import PlanMethod, plan_extension

    config = shape_of(model)
    stages = plan_extension(config, to, cast("PlanMethod", method))
    return {
        "model": model,
        "context": config.context_length,
        "rope_theta": config.rope_theta,
        "to": to,
        "method": method,
        "tokens": sum(stage.tokens for stage in stages),
        "stages": [dataclasses.asdict(stage) for stage in stages],
    }


def _corpus_of(model: str) -> Path:
    """The corpus that a run was trained on. Raises UsageError where `model` is no run with one."""
    from herd import checkpoint
    from herd.architecture import releases
    from herd.errors import UsageError
    from herd.recipe import read_run

    path = Path(model).expanduser()
    if model in releases and not path.exists():
        raise UsageError(f"{model} is a release's name, there are no weights to train", fix="--plan, or herd pull")
    checkpoint.resolve(model)  # raises where there is no such model
    if (path / "run.json").is_file():
        entry = read_run(path)["stages"].get("corpus")
        if entry and (path / entry["directory"] / "train.jsonl").is_file():
            return path / str(entry["directory"])
    raise UsageError(
        "there is no text to train on", value=model, allowed="a run with its corpus, or --corpus DIR",
        fix="herd corpus SOURCES... --out DIR",
    )  # fmt: skip


def _show(data: dict[str, Any]) -> None:
    print(f"{data['model']}: {data['context']:,} → {data['to']:,} tokens, from theta {data['rope_theta']:.4g}\n")
    rows = []
    for stage in data["stages"]:
        rows.append([
            f"{stage['context']:,}",
            f"{stage['rope_theta']:.4g}",
            _scaling(stage),
            f"{stage['batch']} x {stage['accumulation']}",
            f"{stage['steps']}",
            f"{stage['tokens']:,}",
            f"{stage['lr']:g}",
            stage["card"],
        ])  # fmt: skip
    print(table(["context", "theta", "scaling", "batch x accum", "steps", "tokens", "lr", "as the card's"], rows))
    print(f"\n{data['tokens']:,} tokens in all")


def _scaling(stage: dict[str, Any]) -> str:
    scaling = stage["rope_scaling"]
    return f"{scaling['kind']} x{scaling['factor']:g}" if scaling else "none"


def _show_result(state: dict[str, Any]) -> None:
    rows = []
    for stage in state["stages"]:
        plan, result = stage["plan"], stage.get("result")
        rows.append([
            f"{plan['context']:,}",
            f"{plan['rope_theta']:.4g}",
            _scaling(plan),
            f"{result['tokens']:,}" if result else "",
            f"{result['loss']:.3f}" if result else "",
            f"{stage['short']:.4f}" if "short" in stage else "",
            f"{100 * stage['needles']:.0f} %" if "needles" in stage else "",
            ("yes" if all(one["met"] for one in stage["criteria"]) else "no") if "criteria" in stage else "",
        ])  # fmt: skip
    headings = ["context", "theta", "scaling", "tokens", "loss", "bits per byte, short", "needles", "promoted"]
    print(table(headings, rows))
    print(f"\nbits per byte of short text before: {state['short_before']:.4f}")
    if "before" in state:
        print(f"needles found before: {100 * state['before']:.0f} %")
    end = f"stopped {state['stopped']}" if state["stopped"] else f"reached {state['settings']['to']:,} tokens"
    print(f"{end}\nmodel: {state['model']}")
