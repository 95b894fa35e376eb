"""How many ranks each axis of a training run has, and how they are used. Needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from herd.architecture import LlamaConfig
from herd.config import Config
from herd.errors import UsageError
from herd.train.plan.layout import Job, Layout, problems


class ParallelConfig(Config):
    """The mesh, innermost axis first: [TP, CP, PP, DP] (Llama 3 paper, section 3.3.2).

    DP has the ranks that are left. All ones on several ranks without `shard`: every rank holds the whole model and
    gradients are summed.
    """

    tp: int = Field(
        default=1, ge=1, le=64, description="tensor parallel ranks: every matrix is split, and the sequence"
    )
    cp: int = Field(
        default=1, ge=1, le=1024, description="context parallel ranks: the sequence is split in 2·cp chunks"
    )
    pp: int = Field(default=1, ge=1, le=256, description="pipeline ranks: the layers are split")
    ep: int = Field(
        default=1, ge=1, le=1024, description="ranks out of dp·cp that share a layer's routed experts between them"
    )
    replicas: int = Field(
        default=1, ge=1, description="groups of DP ranks that each hold all of the weights (HSDP); must divide dp"
    )
    shard: bool = Field(
        default=False, description="DP ranks hold a part of weights, gradients and optimiser each (FSDP); ep does, too"
    )
    reshard: bool = Field(
        default=False,
        description="gather a block's weights anew for the backward pass, instead of keeping them in between",
    )
    reduce_each: bool = Field(
        default=True,
        description="shard the gradients after every micro-batch; false: once a step, for more memory and less time, as"
        " pipelines always do",
    )
    context: Literal["gather", "ring"] = Field(
        default="gather",
        description="gather: all keys and values at once (Llama 3); ring: a rank's at a time (Gradient)",
    )
    inner_ring: int = Field(
        default=1, ge=1, description="ring: context ranks of a node, whose fast links most steps of the ring use"
    )
    schedule: Literal["gpipe", "1f1b", "interleaved", "looped-bfs", "interleaved-zero-bubble", "zbv", "dualpipev"] = (
        Field(default="1f1b", description="pipeline schedule; all but gpipe and 1f1b have several model chunks a rank")
    )
    virtual: int = Field(default=1, ge=1, le=64, description="model chunks of a pipeline rank")
    contiguous: int | None = Field(
        default=None,
        ge=1,
        description="interleaved: micro-batches a chunk takes in a row (N of the Llama 3 paper); null: pp, depth first",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="activations computed again in the backward pass: selective: all but products and attention",
    )

    @model_validator(mode="after")
    def _fits(self) -> ParallelConfig:
        several = self.schedule not in ("gpipe", "1f1b")
        if several != (self.virtual > 1):
            raise ValueError(
                f"schedule {self.schedule} and virtual {self.virtual} do not go together: "
                "gpipe and 1f1b have one chunk a rank, the others several"
            )
        if self.schedule in ("zbv", "dualpipev") and self.virtual != 2:
            raise ValueError(f"schedule {self.schedule} has two chunks a rank, not {self.virtual}")
        if self.contiguous is not None and self.schedule != "interleaved":
            raise ValueError("contiguous is of schedule interleaved")
        if self.inner_ring > 1 and (self.context != "ring" or self.cp % self.inner_ring):
            raise ValueError(f"inner_ring {self.inner_ring} needs context ring and a cp that it divides, not {self.cp}")
        if self.reshard and not (self.shard or max(self.ep, self.cp) > 1):
            raise ValueError("reshard is of weights that ranks hold parts of: it needs shard, ep or cp")
        return self

    @property
    def needs_mesh(self) -> bool:
        """Whether anything is asked for but whole models whose gradients are summed."""
        return self.shard or max(self.tp, self.cp, self.pp, self.ep, self.replicas) > 1

    def copies(self, dp: int) -> int:
        """How many groups of the `dp` ranks hold all of the weights: each rank one where nothing is sharded."""
        return self.replicas if self.shard or max(self.replicas, self.ep) > 1 else dp

    def layout(self, world_size: int) -> Layout:
        """The layout on so many ranks. Raises UsageError if they cannot be shared evenly."""
        model = self.tp * self.cp * self.pp
        if world_size % model:
            raise UsageError(
                "the ranks cannot be shared between the axes",
                value=f"tp {self.tp} · cp {self.cp} · pp {self.pp} on {world_size} ranks",
                allowed=f"a multiple of {model} ranks",
                fix="change parallel.tp, parallel.cp or parallel.pp, or the number of ranks (torchrun)",
            )
        dp = world_size // model
        if dp % self.replicas:
            raise UsageError(
                "the DP ranks cannot be shared between replicas", value=self.replicas, allowed=f"divisors of {dp}"
            )
        return Layout(self.tp, self.cp, self.pp, dp, self.ep)

    def schedule_problem(self, micro_batches: int) -> str | None:
        """Why the pipeline's schedule cannot run a step of so many micro-batches on a rank; None if it can."""
        least = {"1f1b": self.pp, "dualpipev": self.pp * self.virtual}.get(self.schedule, 1)
        if micro_batches < least:
            return (
                f"schedule {self.schedule} on {self.pp} pipeline ranks needs {least} micro-batches of a step or more, "
                f"not {micro_batches}"
            )
        rounds = max(1, micro_batches // self.pp)
        if self.schedule == "interleaved-zero-bubble" and micro_batches % rounds:
            return (
                f"schedule {self.schedule} on {self.pp} pipeline ranks runs a step in {rounds} equal rounds, which its "
                f"{micro_batches} micro-batches do not make"
            )
        if self.contiguous is not None and self.contiguous < min(self.pp, micro_batches):
            return f"contiguous {self.contiguous} is less than the {self.pp} pipeline ranks"
        return None

    def check(self, shape: LlamaConfig, seq_len: int, batch_size: int, micro_batch: int, world_size: int) -> Layout:
        """The layout, if this model and batch can be split by it; UsageError with every reason otherwise."""
        layout = self.layout(world_size)
        found = problems(layout, Job(shape, seq_len, seq_len * batch_size))
        if layout.ep > 1 and (layout.dp // self.replicas * layout.cp) % layout.ep:
            found.append(
                f"ep={layout.ep} does not divide the {layout.dp // self.replicas * layout.cp} ranks of a replica"
            )
        rows = batch_size // layout.dp
        if self.pp > 1:
            if rows % micro_batch:
                found.append(f"a pipeline's micro-batches of {micro_batch} rows do not divide a rank's {rows} rows")
            elif problem := self.schedule_problem(rows // micro_batch):
                found.append(problem)
            if self.pp * self.virtual > shape.n_layers + 2:
                found.append(
                    f"{self.pp}·{self.virtual} chunks are more than the {shape.n_layers} layers, embedding and output"
                )
        if found:
            raise UsageError("this layout cannot train this model", value=str(layout), allowed="; ".join(found))
        return layout
