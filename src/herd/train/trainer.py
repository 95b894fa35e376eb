"""The one loop: batches in, better weights out, whatever the stage.

A step is: micro-batches of the step's data → sum of their losses → gradients, summed over ranks and divided by the
weight of all supervised targets → verdict of the callbacks → clipping → optimiser. Everything a run needs to continue
is in its state, and everything else is a pure function of (seed, step): a killed run ends in the same bits.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from herd.architecture import LlamaConfig, training_flops_per_token
from herd.errors import HerdError, UsageError
from herd.model import Llama
from herd.train import snapshot
from herd.train.announce import announce, first_line
from herd.train.averaging import WeightAverage
from herd.train.batches import BatchSource, Movable
from herd.train.callbacks import Callback, StepRecord, Verdict
from herd.train.checkpoints import Checkpoints
from herd.train.compilation import CompiledBlocks, compiler_failed, eager, worth_compiling
from herd.train.config import TrainConfig
from herd.train.filling import Weights, fill
from herd.train.float8 import float8_products
from herd.train.guard import Guard
from herd.train.memory import keep_freed_memory
from herd.train.metrics import Metrics, MetricsFile
from herd.train.optimizers import build_optimizer, matrix_dtype
from herd.train.peak import Peak
from herd.train.recompute import recompute
from herd.train.saving import Saver
from herd.train.schedule import lr_factor
from herd.train.signals import StopSignals
from herd.train.state import StateStore
from herd.train.world import World, autocast, current_world

B = TypeVar("B", bound=Movable)
LossFunction = Callable[[Any, B], tuple[Tensor, Tensor]]
RECENT = (20, 200)
"""The loss of a result is the mean over the last twentieth of the steps, at least and at most so many: one batch alone
says little, and a few of them where some of the text is of another kind."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run. `loss` is the mean over the last steps; `seconds` and tokens count resumed runs together."""

    steps: int
    loss: float
    tokens: int
    supervised_tokens: int
    seconds: float
    tokens_per_second: float
    mfu: float | None
    training_flops: float | None
    resumed_from: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for result.json."""
        return dataclasses.asdict(self)


class Trainer(Generic[B]):
    """Trains `model` on `source` by `loss_fn(model, batch) -> (sum of losses, sum of weights)`.

    Writes `out_dir`/metrics.jsonl and checkpoints under `out_dir`/state; continues from them when they are there.
    MFU and compile="auto" are for models whose `config` is a LlamaConfig: their arithmetic is known.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction[B],
        source: BatchSource[B],
        config: TrainConfig,
        out_dir: str | Path,
        callbacks: Sequence[Callback] = (),
        *,
        world: World | None = None,
        weights: Weights | None = None,
    ) -> None:
        """`weights`: where those of a model on the meta device come from."""
        keep_freed_memory()
        self.config = config
        self.world = world or current_world()
        self.device = pick_device(config)
        self.loss_fn = loss_fn
        self.source = source
        self.data = source.fingerprint()
        """What the data is known by: a state of other data is not continued."""
        self.out_dir = Path(out_dir)
        shape = getattr(model, "config", None)
        if config.parallel.needs_mesh and isinstance(shape, LlamaConfig):
            config.parallel.check(shape, config.seq_len, config.batch_size, config.micro_batch_rows, self.world.size)
        self.precision = compute_dtype(config, self.device)
        if config.parallel.recompute != "none" and isinstance(model, Llama):
            recompute(model, config.parallel.recompute)
        if config.float8:
            float8_products(model, self.device)
        self.model = self.world.place(model, self.device, self.precision)
        if weights is not None:
            fill(self.model, weights)
        self.blocks = CompiledBlocks(self.model)
        self.optimizer = build_optimizer(self.model, config)
        beside = config.checkpoint_background
        self.store = StateStore(self.out_dir / "state", config.keep, self.world.aside() if beside else self.world)
        self.saver = Saver(self.store, background=beside)
        self.callbacks: list[Callback] = [Guard(config), *(callback for callback in callbacks if not callback.last)]
        if config.average != "none":
            self.callbacks.append(WeightAverage(config))
        # At the end, so that a checkpoint holds what all others remember of the step.
        self.callbacks += [Metrics(config.log_every), Checkpoints(config), *(one for one in callbacks if one.last)]

        self.step = 0
        """Finished steps."""
        self.cursor = 0
        """Step of the data that comes next: ahead of `step` after the run went back."""
        self.tokens = self.supervised = 0
        self.seconds = 0.0
        self.resumed_from: int | None = None
        self.recent: deque[tuple[float, float]] = deque(maxlen=RECENT[1])
        """(sum of losses, weight) of the last steps."""
        self.row_tokens = config.seq_len
        """Tokens of a row at this step, which attention's share of the FLOPs grows with."""
        self._peak = Peak(self.precision, self.device)
        self._metrics = MetricsFile(self.out_dir / "metrics.jsonl")

    @property
    def total_steps(self) -> int:
        """Steps at the end, as planned at this step: the configuration's, or fewer where a callback limits them."""
        limits = [callback.limit(self.step) for callback in self.callbacks]
        return min([self.config.steps, *(limit for limit in limits if limit is not None)])

    def fit(self) -> TrainResult:
        """Train to the end, from wherever the state is.

        SIGTERM and SIGINT save the state between two steps and leave with exit code 0 or as KeyboardInterrupt. Raises
        UsageError for a state of another configuration, HerdError for damaged checkpoints or a diverged run.
        """
        with StopSignals() as stop, self.saver:
            self.compile()
            self.world.barrier()
            self.world.limit_waiting()
            self._resume()
            for callback in self.callbacks:
                callback.on_start(self)
            while self.step < self.total_steps:
                if self.world.any(stop.received is not None):
                    self.save()
                    self.saver.finish()
                    stop.leave()
                self.train_step()
            self.save()
            self.saver.finish()
            result = self._result()
            for callback in self.callbacks:
                callback.on_finish(self, result)
            return result

    def compile(self) -> None:
        """Compile the blocks if the configuration says so; compiling itself happens in the first step."""
        if not self.blocks.active and worth_compiling(self.config, self.flops_per_token()):
            self.blocks.compile()

    def train_step(self) -> None:
        """One optimiser step, with everything the callbacks do around it. `fit` is this in a loop."""
        start = time.perf_counter()
        factor = lr_factor(self.step, self.total_steps, self.config)
        loss, norm, tokens, weight = self.gradients(self.cursor)
        self.step += 1
        self.cursor += 1
        record = StepRecord(self.step, loss, norm, self.config.lr * factor, tokens, weight, 0.0)
        own = max(callback.on_gradients(self, record) for callback in self.callbacks)
        # Tensor ranks compute the same loss each, and a callback may look at what its rank alone has.
        verdict = Verdict(self.world.largest(own))
        if verdict is not own:
            announce(f"step {self.step} is not applied: another rank found it bad")
        if verdict is Verdict.APPLY:
            clip = self.config.clip
            clipped = clip / norm if clip and norm > clip else 1.0
            # One pass over the gradients for both the mean and the clipping.
            torch._foreach_mul_(self._gradients(), clipped / weight)
            self.optimizer.set_lr(factor)
            self.optimizer.step()
            self.recent.append((loss * weight, weight))
        self.optimizer.zero_grad()
        if verdict is Verdict.ROLL_BACK:
            self._roll_back()
            return
        record = dataclasses.replace(record, seconds=time.perf_counter() - start, verdict=verdict)
        self.tokens += tokens
        self.supervised += round(weight)
        self.seconds += record.seconds
        for callback in self.callbacks:
            callback.on_step(self, record)

    def gradients(self, cursor: int) -> tuple[float, float, int, float]:
        """Leave the gradient of one step's summed losses in `.grad`; the weights' share of it is divided out later.

        Returns (mean loss, norm of the mean gradient, tokens, sum of weights), over all micro-batches and ranks.
        """
        seed = (self.config.seed * 1_000_003 + cursor) % 2**63
        torch.manual_seed(seed)
        random.seed(seed)
        batches = self.source.batch(cursor)
        try:
            sums = self._accumulate(batches)
        except Exception as error:
            if not (self.blocks.active and compiler_failed(error)):
                raise
            announce(f"compiling failed, going on without it ({type(error).__name__}: {first_line(error)})")
            self.blocks.restore()
            self.optimizer.zero_grad()
            sums = self._accumulate(batches)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.world.sum_([sums])
        self.world.reduce_gradients(trainable)
        loss_sum, weight, n_tokens = sums.tolist()
        norm_of_sum = self.world.norm(trainable).item()
        if weight == 0:
            return math.nan, math.nan, int(n_tokens), 0.0
        return loss_sum / weight, norm_of_sum / weight, int(n_tokens), weight

    @torch.no_grad()
    def evaluate(self, batches: Iterable[B]) -> tuple[float, float]:
        """(sum of losses, sum of weights) of batches under the current weights, in the precision of training.

        Runs eagerly: few forward passes are not worth another compilation. Random generators are left as they were.
        """
        training = self.model.training
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.random.fork_rng(enabled=self.device.type == "cpu", devices=[]), eager(), self._autocast():
            for batch in batches:
                batch = self.world.local(batch.to(self.device))
                if self.world.pipeline is not None:
                    sums += self.world.pipeline.evaluate(batch)[:2].cpu()
                    continue
                loss, weight = self.loss_fn(self.model, batch)
                sums += torch.stack([loss, weight]).double().cpu()
        self.world.let_go()
        self.model.train(training)
        self.world.sum_shared_(sums)
        loss_sum, weight_sum = sums.tolist()
        return loss_sum, weight_sum

    def log(self, values: dict[str, Any]) -> None:
        """Append a line for the current step to metrics.jsonl."""
        if self.world.rank == 0:
            self._metrics.write(self.step, values)

    def logged(self, name: str) -> bool:
        """Whether metrics.jsonl has `name` for the current step, from before an interruption maybe."""
        return self._metrics.has(self.step, name)

    def mfu(self, tokens_per_second: float) -> float | None:
        """Share of the measured matmul peak that this speed uses for the model's own arithmetic.

        An upper bound where documents are shorter than a row: attention counts as over whole rows.
        """
        if (flops := self.flops_per_token()) is None:
            return None
        return self._peak.share(tokens_per_second / self.world.size * flops)

    def flops_per_token(self) -> float | None:
        """Floating-point operations to train on one token, a mean over those seen so far; None where unknown."""
        shape = getattr(self.model, "config", None)
        if not isinstance(shape, LlamaConfig):
            return None
        supervised = self.supervised / self.tokens if self.tokens else 1.0
        return training_flops_per_token(shape, self.row_tokens, supervised)

    def save(self) -> None:
        """Write a checkpoint of the whole state, once per step."""
        self.saver.finish()
        there = self.world.rank == 0 and self.step in self.store.steps()
        if not self.world.any(there):
            self.saver.save(self.step, *snapshot.capture(self))

    def _accumulate(self, batches: Sequence[B]) -> Tensor:
        """Backward pass of every micro-batch; (sum of losses, sum of weights, tokens)."""
        if self.world.pipeline is not None:
            return self.world.pipeline.train([self.world.local(batch.to(self.device)) for batch in batches])
        sums = torch.zeros(3, device=self.device)
        # One autocast region for the whole step: weights that stay are cast once, not once per micro-batch.
        with self._autocast():
            for number, batch in enumerate(batches, start=1):
                batch = self.world.local(batch.to(self.device))
                self.world.last_micro_batch(number == len(batches))
                loss, weight = self.loss_fn(self.model, batch)
                with torch.autocast(self.device.type, enabled=False):
                    torch.autograd.backward(loss)
                sums += torch.stack([loss.detach().float(), weight.detach().float(), weight.new_tensor(batch.n_tokens)])
        return sums

    def _autocast(self) -> torch.autocast:
        return autocast(self.device, self.precision, splits=self.world.splits)

    def _gradients(self) -> list[Tensor]:
        """This rank's gradients of the trainable weights."""
        gradients = [p.grad for p in self.model.parameters() if p.requires_grad and p.grad is not None]
        return [g.to_local() if hasattr(g, "to_local") else g for g in gradients]

    def _roll_back(self) -> None:
        """Back to the newest checkpoint, but on with the data behind the step that failed."""
        failed, cursor = self.step, self.cursor
        if not self._load():
            raise HerdError("training diverged before its first checkpoint", fix="lower lr or lengthen warmup")
        self.cursor = cursor
        self._rewind_metrics()
        self.log({"event": "rollback", "from_step": failed})
        announce(f"went back from step {failed} to {self.step}; the data in between is left out")

    def _resume(self) -> None:
        if self.world.rank == 0:
            self.store.sweep()
        found = self._load()
        self.world.barrier()  # all have looked before rank 0 writes a first checkpoint
        self._rewind_metrics()
        if found:
            self.resumed_from = self.step
        else:
            self.save()

    def _rewind_metrics(self) -> None:
        """Drop what metrics.jsonl says of later steps; all of it at step 0, which starts over."""
        if self.world.rank == 0:
            self._metrics.rewind(self.step or -1)

    def _load(self) -> bool:
        """Take everything from the newest checkpoint; False when there is none."""
        self.saver.finish()
        found = self.store.load_newest(dict(self.model.named_parameters()))
        if found is not None:
            snapshot.restore(self, *found)
        return found is not None

    def _result(self) -> TrainResult:
        few, many = RECENT
        last = list(self.recent)[-min(max(few, self.step // 20), many) :]
        losses, weights = (sum(column) for column in zip(*last, strict=True)) if last else (0.0, 0.0)
        speed = self.tokens / self.seconds if self.seconds else 0.0
        return TrainResult(
            steps=self.step,
            loss=losses / weights if weights else math.nan,
            tokens=self.tokens,
            supervised_tokens=self.supervised,
            seconds=self.seconds,
            tokens_per_second=speed,
            mfu=self.mfu(speed),
            training_flops=None if (flops := self.flops_per_token()) is None else flops * self.tokens,
            resumed_from=self.resumed_from,
        )


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """What the products of training are computed in; "auto" takes what is faster on the device."""
    return matrix_dtype(device) if config.precision == "auto" else _DTYPES[config.precision]


def pick_device(config: TrainConfig) -> torch.device:
    """The configured device; "auto" takes a GPU if there is one. Raises UsageError for a GPU that is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device", value="device=cuda", allowed="cpu, auto")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
