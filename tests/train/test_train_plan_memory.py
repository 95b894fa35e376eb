"""What a GPU holds: parameters against the releases, pipeline schedules against torch's own orders."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from herd.architecture import LlamaConfig, active_parameter_count, releases, tensor_shapes, training_flops_per_token
from herd.train.plan import Job, Layout, Settings
from herd.train.plan.layout import Schedule, stages
from herd.train.plan.memory import in_flight, memory
from herd.train.plan.parts import layer, pipeline, stage_parameters
from herd.train.plan.step_time import model_flops, turns

GIB = 2**30
_8B, _405B = releases["llama3.1-8b"].config, releases["llama3.1-405b"].config
SCOUT, MAVERICK = releases["llama4-scout-17b-16e"].config, releases["llama4-maverick-17b-128e"].config


def held(config: LlamaConfig, layout: Layout, virtual: int = 1) -> int:
    """Parameters of one GPU of every pipeline rank, together."""
    return sum(
        sum(stage_parameters(config, layout, stage)) for stage in pipeline(config, layout.tp, layout.pp, virtual)
    )


@pytest.mark.parametrize("name", releases)
def test_one_gpu_holds_every_parameter(name: str) -> None:
    assert held(releases[name].config, Layout(1, 1, 1, 1)) == releases[name].parameters


@pytest.mark.parametrize(
    ("name", "tp", "pp", "ep"),
    [("llama3.1-405b", 8, 16, 1), ("llama3.2-1b", 4, 1, 1), ("llama4-scout-17b-16e", 8, 4, 16),
     ("llama4-maverick-17b-128e", 2, 3, 8)],
)  # fmt: skip
def test_ranks_together_hold_the_model_once(name: str, tp: int, pp: int, ep: int) -> None:
    """Apart from vectors and routers, which every rank has, and from what expert ranks have in common."""
    config = releases[name].config
    shapes = tensor_shapes(config)
    whole = sum(math.prod(shape) for key, shape in shapes.items() if len(shape) == 1 or ".router." in key)
    experts = sum(math.prod(shape) for key, shape in shapes.items() if ".experts." in key)
    split = releases[name].parameters - whole - experts
    assert held(config, Layout(tp, 1, pp, ep, ep)) == split // tp + whole + experts // (tp * ep)


def test_tied_embeddings_are_on_both_ends_of_a_pipeline() -> None:
    tied = releases["llama3.2-1b"]
    table = tied.config.vocab_size * tied.config.dim
    assert held(tied.config, Layout(1, 1, 4, 1)) == tied.parameters + table


def test_key_value_heads_are_replicated_beyond_their_number() -> None:
    kv = 2 * _405B.dim * _405B.head_dim  # wk and wv of one head
    split = lambda tp: layer(_405B, tp, 1, False).shared  # noqa: E731
    rest = split(8) - kv - 2 * _405B.dim
    assert split(16) == rest // 2 + kv + 2 * _405B.dim
    assert split(4) == rest * 2 + 2 * kv + 2 * _405B.dim


@pytest.mark.parametrize(("layers", "pp", "virtual"), [(126, 16, 8), (126, 8, 2), (32, 5, 3), (16, 16, 1), (80, 1, 1)])
def test_stages_cover_the_layers_in_order(layers: int, pp: int, virtual: int) -> None:
    split = stages(layers, pp, virtual)
    assert [i for chunk in range(virtual) for rank in range(pp) for i in split[rank][chunk]] == list(range(layers))
    sizes = [len(split[rank][chunk]) for chunk in range(virtual) for rank in range(pp)]
    with_ends = [size + (i == 0) + (i == len(sizes) - 1) for i, size in enumerate(sizes)]
    assert max(with_ends) - min(with_ends) <= 1


def test_the_papers_stages() -> None:
    """Section 3.3.2: the first chunk has only the embedding, the last only the output."""
    sizes = [[len(chunk) for chunk in rank] for rank in stages(126, 16, 8)]
    assert sizes[0] == [0, *[1] * 7] and sizes[-1] == [*[1] * 7, 0] and sizes[1:-1] == [[1] * 8] * 14


def order(schedule: Schedule, pp: int, virtual: int, count: int) -> list[list[tuple[str, int, int]]]:
    """The operations of every rank, (F or B, stage, micro-batch): torch's; of plain 1F1B by its definition."""
    found = []
    for rank in range(pp):
        if schedule == "1f1b":
            warm = min(count, pp - rank - 1)
            ops = [("F", rank, i) for i in range(warm)]
            for i in range(count - warm):
                ops += [("F", rank, warm + i), ("B", rank, i)]
            found.append(ops + [("B", rank, i) for i in range(count - warm, count)])
            continue
        torch_schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
        kind: Any = torch_schedules.ScheduleLoopedBFS
        if schedule == "interleaved":
            kind = torch_schedules.ScheduleInterleaved1F1B
        one = object.__new__(kind)
        one.__dict__.update(
            pp_group_size=pp, rank=rank, n_local_stages=virtual, number_of_rounds=max(1, count // pp),
            microbatches_per_round=count // max(1, count // pp), _n_microbatches=count,
            _stages=[SimpleNamespace()] * virtual,
        )  # fmt: skip
        actions = [action for action in one._calculate_single_rank_operations(rank) if action is not None]
        found.append(
            [("F" if a.computation_type.name == "FORWARD" else "B", a.stage_index, a.microbatch_index) for a in actions]
        )
    return found


def makespan(orders: list[list[tuple[str, int, int]]], last: int) -> int:
    """Time until the last operation ends, where a forward pass takes 1 and a backward pass 2."""
    done: dict[tuple[str, int, int], int] = {}
    clocks, heads = [0] * len(orders), [0] * len(orders)
    while any(head < len(ops) for head, ops in zip(heads, orders, strict=True)):
        moved = False
        for rank, ops in enumerate(orders):
            if heads[rank] == len(ops):
                continue
            kind, stage, i = ops[heads[rank]]
            needs = [("F", stage - 1, i)] if kind == "F" and stage else []
            if kind == "B":
                needs = [("F", stage, i)] + ([("B", stage + 1, i)] if stage < last else [])
            if all(need in done for need in needs):
                start = max([clocks[rank], *(done[need] for need in needs)])
                clocks[rank] = done[kind, stage, i] = start + (1 if kind == "F" else 2)
                heads[rank] += 1
                moved = True
        assert moved, "the order waits for itself"
    return max(clocks)


@pytest.mark.parametrize(
    ("schedule", "pp", "virtual", "count"),
    [("1f1b", 4, 1, 8), ("1f1b", 4, 1, 2), ("gpipe", 4, 1, 6), ("interleaved", 4, 2, 8), ("interleaved", 4, 3, 4),
     ("interleaved", 2, 4, 6), ("looped-bfs", 4, 2, 6), ("looped-bfs", 4, 3, 2)],
)  # fmt: skip
def test_schedules_against_their_order_of_operations(schedule: Schedule, pp: int, virtual: int, count: int) -> None:
    orders = order(schedule, pp, virtual, count)
    for rank, ops in enumerate(orders):
        alive = peak = 0
        for kind, _, _ in ops:
            alive += 1 if kind == "F" else -1
            peak = max(peak, alive)
        assert in_flight(schedule, pp, virtual, count, rank) == peak
    assert makespan(orders, pp * virtual - 1) == 3 * turns(pp, virtual, count)


def test_less_is_kept_where_more_is_computed_again() -> None:
    job = Job(_405B, 8192, 2**24, trainer="published")
    layout, needs = Layout(8, 1, 16, 64), []
    for recompute in ("none", "selective", "full"):
        needs.append(memory(job, layout, Settings(1, "interleaved", 8, recompute, "optimizer")).total)
    assert needs == sorted(needs, reverse=True) and needs[2] < needs[0] / 2


def test_sharding_divides_what_it_says() -> None:
    job = Job(_8B, 8192, 2**20, trainer="published")
    layout = Layout(1, 2, 1, 8)
    by = {one: memory(job, layout, Settings(sharding=one)) for one in ("optimizer", "gradients", "parameters")}
    n = releases["llama3.1-8b"].parameters
    assert all(one.optimizer == pytest.approx(12 * n / 16) for one in by.values())
    assert by["optimizer"].weights == by["gradients"].weights == 2 * n > 3 * by["parameters"].weights
    assert by["optimizer"].gradients > 4 * n > 3 * by["gradients"].gradients
    alone = memory(Job(_8B, 8192, 8192, trainer="published"), Layout(1, 1, 1, 1), Settings())
    assert (alone.weights, alone.gradients, alone.optimizer) == (2 * n, 4 * n, 12 * n)


def test_context_and_tensor_ranks_divide_activations() -> None:
    job = Job(_8B, 131_072, 2**22, trainer="published")
    whole = memory(job, Layout(1, 1, 1, 32), Settings(sharding="parameters"))
    halves = memory(job, Layout(1, 2, 1, 16), Settings(sharding="parameters"))
    assert halves.activations == pytest.approx(whole.activations / 2, rel=0.02)
    by_tensor = memory(job, Layout(2, 1, 1, 16), Settings(sharding="parameters"))
    assert by_tensor.activations == pytest.approx(whole.activations / 2, rel=0.05)


def test_expert_ranks_divide_experts_and_nothing_else() -> None:
    for config in (SCOUT, MAVERICK):
        one, eight = layer(config, 1, 1, True), layer(config, 1, 8, True)
        assert one.experts == 8 * eight.experts and one.shared == eight.shared and one.products == eight.products
    assert layer(MAVERICK, 1, 1, False).experts == 0
    job = Job(SCOUT, 8192, 2**22)
    alone = memory(job, Layout(1, 1, 1, 64, 1), Settings(sharding="optimizer"))
    spread = memory(job, Layout(1, 1, 1, 64, 16), Settings(sharding="optimizer"))
    assert spread.optimizer == pytest.approx(alone.optimizer) and spread.weights < alone.weights / 4


def test_flops_are_those_of_the_architecture() -> None:
    for name in ("llama2-7b", "llama3.1-405b", "llama3.2-1b"):
        config = releases[name].config
        expected = training_flops_per_token(config, 4096)
        # The other count includes the norms' vectors as weights that multiply.
        assert model_flops(Job(config, 4096, 2**20)) / 2**20 == pytest.approx(expected, rel=1e-4)
    embedding = SCOUT.vocab_size * SCOUT.dim
    short = replace(SCOUT, attention_chunk=1)
    weights = model_flops(Job(replace(short, nope_interval=0), 8, 8)) / 8 / 6
    assert weights == pytest.approx(active_parameter_count(SCOUT) - embedding, rel=1e-3)
    assert model_flops(Job(SCOUT, 2**17, 2**20)) < model_flops(Job(replace(SCOUT, attention_chunk=None), 2**17, 2**20))
