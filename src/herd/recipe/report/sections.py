"""The report's sections on the run, its data, its tokenizer, its model, its cost and how to repeat it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from herd.architecture import LlamaConfig, tensor_shapes
from herd.recipe.report.config import CARBON_REASON, WATTS_REASON
from herd.recipe.report.data import RunData
from herd.recipe.report.html import Child, Html, join, table, tag
from herd.recipe.units import count, duration, scientific, size


@dataclass(frozen=True)
class Section:
    """A heading with its anchor, and what stands under it."""

    id: str
    title: str
    body: Html


def stages_section(run: RunData) -> Section:
    """What ran, how long, and what came out."""
    rows: list[list[Child]] = []
    for name, manifest in run.manifests.items():
        rows.append(
            [
                name,
                duration(manifest["wall_seconds"]),
                duration(manifest["cpu_seconds"]),
                size(manifest["peak_memory_bytes"]),
                manifest["summary"],
            ]
        )
    rows.append([tag("b", "all"), tag("b", duration(run.wall_seconds)), tag("b", duration(run.cpu_seconds)), "", ""])
    resumed = [name for name, manifest in run.manifests.items() if manifest["attempts"] > 1]
    note = f"Continued after a stop: {', '.join(resumed)}." if resumed else ""
    body = join(
        [
            table(["stage", "time", "CPU time", "peak memory", "result"], rows, numeric=(1, 2, 3)),
            tag("p", "CPU time adds up all cores. ", note, class_="note"),
        ]
    )
    return Section("stages", "The run", body)


def corpus_section(run: RunData) -> Section | None:
    """Where the text came from and what each cleaning step removed."""
    stats = run.result("corpus", "stats.json")
    if not stats:
        return None
    rows: list[list[Child]] = []
    for step in stats.get("steps", []):
        reasons = sorted(step["reasons"].items(), key=lambda item: -item[1]["bytes"])
        why = ", ".join(f"{name} ({entry['documents']:,})" for name, entry in reasons[:6])
        rows.append(
            [
                step["name"],
                f"{step['documents_out']:,}",
                size(step["bytes_out"]),
                _lost(step["bytes_in"], step["bytes_out"]),
                why,
            ]
        )
    split = [
        ["training", f"{stats['train_documents']:,}", size(stats["train_bytes"])],
        ["held out", f"{stats['heldout_documents']:,}", size(stats["heldout_bytes"])],
    ]
    held = ", ".join(stats.get("heldout_groups", [])[:60])
    return Section(
        "corpus",
        "Text",
        join(
            [
                tag("p", "Each step, what was left after it, and what it took away (documents in brackets)."),
                table(["step", "documents", "bytes", "removed", "for"], rows, numeric=(1, 2, 3)),
                tag("h3", "Split"),
                tag("p", stats.get("split", ""), class_="note"),
                table(["part", "documents", "bytes"], split, numeric=(1, 2)),
                tag("details", tag("summary", "Held-out groups"), tag("pre", held)) if held else None,
            ]
        ),
    )


def tokenizer_section(run: RunData) -> Section | None:
    """Size and compression of the vocabulary."""
    facts = run.result("tokenizer", "results.json")
    if not facts:
        return None
    rows: list[list[Child]] = [
        ["tokens in the vocabulary", f"{facts['vocab_size']:,}"],
        ["of these special", f"{facts['specials']:,}"],
        ["bytes per token, training text", f"{facts['train']['bytes_per_token']:.3f}"],
    ]
    if facts["heldout"]["tokens"]:
        rows.append(["bytes per token, held-out text", f"{facts['heldout']['bytes_per_token']:.3f}"])
    longest = [tag("code", repr(text)[1:-1].replace(" ", "·")) for text in facts.get("longest", [])[:12]]
    spaced: list[Child] = []
    for item in longest:
        spaced += [item, "  "]
    return Section(
        "tokenizer",
        "Tokens",
        join(
            [
                tag(
                    "p", "Byte-level byte-pair encoding with the split rules of Llama 3, trained on the training part."
                ),
                table(["", ""], rows, numeric=(1,), class_="facts"),
                tag("p", "Longest tokens: ", spaced, class_="note") if spaced else None,
            ]
        ),
    )


def model_section(run: RunData) -> Section | None:
    """The model's shape and where its parameters are."""
    model = run.model
    if model is None:
        return None
    groups = parameter_groups(model)
    total = sum(groups.values())
    rows: list[list[Child]] = [[name, f"{n:,}", f"{100 * n / total:.1f} %"] for name, n in groups.items() if n]
    rows.append([tag("b", "all"), tag("b", f"{total:,}"), ""])
    return Section(
        "model",
        "Model",
        join(
            [
                tag(
                    "div",
                    table(["", ""], [[name, value] for name, value in shape_rows(model)], numeric=(1,), class_="facts"),
                    table(["part", "parameters", "share"], rows, numeric=(1, 2)),
                    class_="pair",
                ),
            ]
        ),
    )


def shape_rows(model: LlamaConfig) -> list[tuple[str, str]]:
    """The architecture in words and figures."""
    rows = [
        ("architecture", f"Llama decoder, {model.generation}"),
        ("layers", f"{model.n_layers}"),
        ("width", f"{model.dim:,}"),
        ("query heads × head width", f"{model.n_heads} × {model.head_dim}"),
        ("key and value heads", f"{model.n_kv_heads}"),
        ("feed-forward width (SwiGLU)", f"{model.ffn_dim:,}"),
        ("vocabulary", f"{model.vocab_size:,}"),
        ("context, tokens", f"{model.context_length:,}"),
        ("RoPE θ", f"{model.rope_theta:,.0f}"),
        ("output matrix", "tied to the embedding" if model.tied_embeddings else "its own"),
    ]
    if model.moe is not None:
        rows.append(("experts, used per token", f"{model.moe.n_experts}, {model.moe.top_k}"))
    return rows


def parameter_groups(model: LlamaConfig) -> dict[str, int]:
    """Part of the model → parameters, from the tensor shapes."""
    groups = {"embedding": 0, "attention": 0, "feed-forward": 0, "norms": 0, "output": 0}
    for name, shape in tensor_shapes(model).items():
        numbers = 1
        for extent in shape:
            numbers *= extent
        if "norm" in name:
            groups["norms"] += numbers
        elif name.startswith("embed"):
            groups["embedding"] += numbers
        elif name.startswith("output"):
            groups["output"] += numbers
        else:
            groups["attention" if ".attention." in name else "feed-forward"] += numbers
    return groups


def cost_section(run: RunData) -> Section | None:
    """FLOPs, energy, carbon, with the formulas."""
    if not run.manifests:
        return None
    parts: list[Child] = []
    rows: list[list[Child]] = []
    for name, training in run.training.items():
        if compute := training.compute:
            rows.append(
                [
                    name,
                    f"{compute.tokens:,}",
                    scientific(compute.weight_flops),
                    scientific(compute.attention_flops),
                    scientific(compute.flops),
                    f"{compute.pflop_days:.2e}",
                ]
            )
    if rows:
        first = next(training.compute for training in run.training.values() if training.compute)
        heads = ["stage", "tokens D", "6·N·D", "attention", "FLOPs", "petaFLOP-days"]
        parts += [
            tag("h3", "Computation"),
            tag("p", "FLOPs = 6·N·D + 6·L·H·K·S·D", class_="formula"),
            tag(
                "p",
                f"N = {first.weights:,} weights that multiply (the embedding look-up multiplies nothing), D tokens, L "
                "layers, H heads of width K, S tokens in a row. Forward and backward together; the output matrix "
                "counts for supervised tokens only. An upper bound, since documents are mostly shorter than a row.",
                class_="note",
            ),
            table(heads, rows, numeric=range(1, 6)),
        ]
    energy = run.energy()
    lines: list[list[Child]] = []
    for name in run.manifests:
        part = run.energy(name)
        lines.append([name, f"{part.hours:.3f}", f"{1000 * part.kwh:.2f}", f"{1e6 * part.tonnes_co2:.2f}"])
    lines.append(
        [
            tag("b", "all"),
            tag("b", f"{energy.hours:.3f}"),
            tag("b", f"{1000 * energy.kwh:.2f}"),
            tag("b", f"{1e6 * energy.tonnes_co2:.2f}"),
        ]
    )
    parts += [
        tag("h3", "Energy and carbon"),
        tag("p", "tCO2 = h × W × PUE × kg/kWh ÷ 10⁶", class_="formula"),
        tag(
            "p",
            f"h: busy core-hours, measured. W = {energy.watts:g} per core: {WATTS_REASON}. PUE = {energy.pue:g} and "
            f"{energy.kg_per_kwh:g} kg/kWh by default: {CARBON_REASON}. {uncounted(run)}",
            class_="note",
        ),
        table(["stage", "core-hours", "Wh", "g CO2"], lines, numeric=(1, 2, 3)),
    ]
    return Section("cost", "Cost", join(parts))


def repeat_section(run: RunData) -> Section:
    """Command, machine, versions, and every value that was used."""
    last = list(run.manifests.values())[-1] if run.manifests else {}
    exact = run.fixed_steps
    machine: dict[str, Any] = last.get("host", {})
    facts: list[list[Child]] = [
        ["seed", str(run.seed)],
        ["processor", str(machine.get("cpu", ""))],
        ["cores used", str(machine.get("cores", ""))],
        ["memory", size(machine.get("memory_bytes", 0))],
        ["system", f"{machine.get('system', '')}, Python {machine.get('python', '')}"],
        ["packages", ", ".join(f"{name} {version}" for name, version in last.get("packages", {}).items())],
        ["finished", str(last.get("finished", "")).replace("T", " ").replace("+00:00", " UTC")],
    ]
    configs = [
        tag(
            "details",
            tag("summary", f"{name}, {manifest['hash'][:8]}"),
            tag("pre", json.dumps(manifest["key"]["config"], indent=2, ensure_ascii=False)),
        )
        for name, manifest in run.manifests.items()
    ]
    body = [
        tag("pre", run.command, class_="formula"),
        tag("p", "As many steps without a clock: ", tag("code", " ".join(exact)), class_="note") if exact else None,
        table(["", ""], facts, class_="facts"),
        tag("h3", "Every value, stage by stage"),
        configs,
    ]
    return Section("repeat", "Repeat it", join(body))


def uncounted(run: RunData) -> str:
    """A sentence on GPUs, whose energy CPU time says nothing about; empty where none was there."""
    return f"The energy of the GPU ({', '.join(run.gpus)}) is not counted." if run.gpus else ""


def headline(run: RunData) -> str:
    """The run in two sentences."""
    parameters = run.parameters
    stats = run.result("corpus", "stats.json")
    text = f" on {size(stats['train_bytes'])} of text" if stats else ""
    base = run.training.get("base")
    time = f" in {duration(base.manifest['wall_seconds'])}" if base else ""
    first = f"A Llama of {count(parameters)} parameters, trained from scratch{text}{time}." if parameters else "A run."
    if not run.bits:
        return first
    second = f" After pretraining it needs {next(iter(run.bits.values())):.2f} bits for a byte of text it has not seen"
    compressor, value = run.best_compressor
    return first + second + (f"; {compressor} needs {value:.2f}." if compressor else ".")


def _lost(before: int, after: int) -> str:
    return "" if before <= 0 or after >= before else f"{100 * (before - after) / before:.1f} %"
