"""Published runs that the planner is compared with: Llama 3 paper, Table 4, and torchtitan's benchmarks of 2024-12 and
2025-06. `speed_fitted`, `memory_fitted`: constants of herd.train.plan were fitted to this figure (docs/plan.md)."""

from __future__ import annotations

from dataclasses import dataclass

from herd.architecture import releases
from herd.train.plan import GPUS, Gpu, Job, Layout, Memory, Settings, StepTime
from herd.train.plan.layout import Precision, Recompute, Schedule, Sharding
from herd.train.plan.memory import memory
from herd.train.plan.step_time import step_time


@dataclass(frozen=True)
class Run:
    """`speed`: TFLOP/s per GPU of Table 4, tokens/s per GPU of torchtitan; `gib`: reserved memory of the fullest GPU.
    Both with the several readings that one layout has (eager and compiled, with and without asynchronous TP)."""

    name: str
    model: str
    layout: Layout
    seq: int
    sequences: int
    settings: Settings
    speed: tuple[float, ...]
    gib: tuple[float, ...] = ()
    precision: Precision = "bf16"
    card: str = "h100-500w"
    speed_fitted: bool = False
    memory_fitted: bool = False

    @property
    def job(self) -> Job:
        loss = "chunked" if self.card == "h100" else "whole"
        config = releases[f"llama3.1-{self.model}"].config
        return Job(config, self.seq, self.seq * self.sequences, self.precision, loss, "published")

    @property
    def gpu(self) -> Gpu:
        return GPUS[self.card]

    def memory(self) -> Memory:
        return memory(self.job, self.layout, self.settings)

    def time(self, gpu: Gpu | None = None) -> StepTime:
        return step_time(self.job, self.layout, self.settings, gpu or self.gpu)

    def predicted_speed(self, gpu: Gpu | None = None) -> float:
        time = self.time(gpu)
        if self.card == "h100":
            return time.flops / time.seconds / self.layout.gpus / 1e12
        return self.job.batch_tokens / time.seconds / self.layout.gpus


def _paper(gpus: int, cp: int, dp: int, seq: int, tflops: float, fitted: bool) -> Run:
    # 126 layers, an embedding and an output on 16 ranks: one layer a chunk, "one layer less on the first and last".
    settings = Settings(1, "interleaved", 8, "none", "optimizer")
    name = f"{gpus:,} GPUs, {seq:,} tokens"
    return Run(
        name, "405b", Layout(8, cp, 16, dp), seq, 2**24 // seq, settings, (tflops,), card="h100", speed_fitted=fitted
    )


TABLE_4 = (
    _paper(8192, 1, 64, 8192, 430, True),
    _paper(16_384, 1, 128, 8192, 400, False),
    _paper(16_384, 16, 8, 131_072, 380, True),  # the printed DP of 4 does not give 16,384 GPUs
)


def _titan(
    name: str,
    model: str,
    mesh: tuple[int, int, int, int],
    seq: int,
    sequences: int,
    micro: int,
    recompute: Recompute,
    sharding: Sharding,
    speed: tuple[float, ...],
    gib: tuple[float, ...] = (),
    *,
    schedule: Schedule = "1f1b",
    precision: Precision = "fp8",
    fitted: tuple[bool, bool] = (False, False),
) -> Run:
    settings = Settings(micro, schedule, 2 if schedule == "interleaved" else 1, recompute, sharding)
    layout = Layout(*mesh)
    return Run(
        name, model, layout, seq, sequences, settings, speed, gib, precision, speed_fitted=fitted[0],
        memory_fitted=fitted[1],
    )  # fmt: skip


TITAN = (
    _titan("8B, 8 GPUs, bf16", "8b", (1, 1, 1, 8), 8192, 16, 2, "selective", "parameters", (6667,), (82.4, 77.0),
           precision="bf16", fitted=(True, False)),
    _titan("8B, 8 GPUs", "8b", (1, 1, 1, 8), 8192, 16, 2, "selective", "parameters", (8532,), (76.8,),
           fitted=(True, False)),
    _titan("8B, 128 GPUs, bf16", "8b", (1, 1, 1, 128), 8192, 256, 2, "selective", "parameters", (6514,), (67.0, 62.0),
           precision="bf16"),
    _titan("8B, 128 GPUs", "8b", (1, 1, 1, 128), 8192, 256, 2, "selective", "parameters", (8380,), (61.8,)),
    _titan("8B, 32K", "8b", (1, 1, 1, 8), 32_768, 8, 1, "full", "parameters", (3890,), (83.9,), fitted=(True, True)),
    _titan("8B, 64K, CP 2", "8b", (1, 2, 1, 4), 65_536, 4, 1, "full", "parameters", (2540,), (84.2,)),
    _titan("8B, 128K, CP 4", "8b", (1, 4, 1, 2), 131_072, 2, 1, "full", "parameters", (1071,), (84.0,)),
    _titan("8B, 256K, CP 8", "8b", (1, 8, 1, 1), 262_144, 1, 1, "full", "parameters", (548,), (84.5,)),
    _titan("70B, TP 8", "70b", (8, 1, 1, 32), 8192, 512, 16, "full", "parameters", (829,), (71.9, 67.6)),
    _titan("70B, TP 8, bf16", "70b", (8, 1, 1, 32), 8192, 512, 16, "full", "parameters", (597,), precision="bf16"),
    _titan("405B, 1F1B", "405b", (8, 1, 8, 8), 8192, 256, 4, "full", "optimizer", (100,), (82.5,)),
    _titan("405B, interleaved", "405b", (8, 1, 8, 8), 8192, 256, 2, "full", "optimizer", (128,), (72.7,),
           schedule="interleaved", fitted=(False, True)),
    _titan("405B, 32K", "405b", (8, 1, 8, 8), 32_768, 64, 1, "full", "optimizer", (76,), (75.3,)),
    _titan("405B, 64K, CP 2", "405b", (8, 2, 8, 4), 65_536, 32, 1, "full", "optimizer", (47,), (75.9,)),
    _titan("405B, 128K, CP 4", "405b", (8, 4, 8, 2), 131_072, 16, 1, "full", "optimizer", (31,), (77.1,)),
    _titan("405B, 256K, CP 8", "405b", (8, 8, 8, 1), 262_144, 8, 1, "full", "optimizer", (16,), (84.9,)),
)  # fmt: skip
