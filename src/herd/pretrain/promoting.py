"""A run whose rows grow goes on to the next phase only when the model is ready for it (arXiv 2407.21783 §3.4.2).

Where a phase ends, and where annealing begins or the run ends, the training ranks themselves judge the model as it is
spread over them, with two criteria of `herd.pretrain.promotion`: short text is read as by the model that the run begins
with, and the numbers hidden in rows of the phase's length are found. A number counts as found when the whole of it has
more than half of the probability, -ln p < ln 2. Greedy decoding then says it, so this asks at least as much as `herd
needle` does, and it is one forward pass a number, on any mesh. The account is promotion.json. A phase is judged after
the first step that is applied at or behind its end: where the last ones are left out, a few of the next come first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from herd.architecture import LlamaConfig
from herd.corpus import Batch as ArrayBatch
from herd.corpus import EvaluationWindows
from herd.errors import HerdError, UsageError
from herd.files import write_json
from herd.pretrain.config import Criteria
from herd.pretrain.heldout import score
from herd.pretrain.phases import Phases
from herd.pretrain.promotion import criteria
from herd.train.announce import announce
from herd.train.batches import Batch
from herd.train.callbacks import Callback, StepRecord, Verdict
from herd.train.export import Arrays, export
from herd.train.trainer import Trainer

FILE, UNPROMOTED = "promotion.json", "unpromoted"
Hidden = Callable[[int], Iterable[tuple[Sequence[int], Sequence[int]]]]
"""length → (ids of a prompt, ids of its answer) for each number hidden in texts of so many tokens, answers included."""


@dataclass(frozen=True)
class Promote:
    """What each phase is judged by. `short`: tokens of the windows that short text is read in; None: as many as a row
    of the first phase has."""

    criteria: Criteria
    hidden: Hidden
    short: int | None = None


@dataclass
class Promotion(Callback):
    """Judges the phases of a run that lasts `steps` steps before it anneals; `leave(weights)` writes those of one that
    failed, on rank 0, to out/unpromoted.

    `first`: the model that the run begins with, whose RoPE may be another one. Raises HerdError where a criterion is
    not met, with the state saved: the same run goes on there when less is asked.
    """

    promote: Promote
    phases: Phases
    steps: int
    short: EvaluationWindows
    first: LlamaConfig
    out: Path
    leave: Callable[[Arrays], None]
    name = "promote"
    last = True
    _judged: list[dict[str, Any]] = field(default_factory=list)
    _before: float = math.nan

    def on_start(self, trainer: Trainer[Any]) -> None:
        if trainer.step == 0:
            with _as(trainer, self.first):
                self._judged, self._before = [], self._score(trainer)
            self._write(trainer)
        elif math.isnan(self._before):
            why = f"{self.out} was begun without base.promote: how it read short text is not known"
            raise UsageError(why, fix="base.promote=null")
        elif (context := self._due(trainer)) is not None:
            self._judge(trainer, context)

    def on_step(self, trainer: Trainer[Any], record: StepRecord) -> None:
        # Nothing is saved while steps are skipped: going back is to lead behind the trouble.
        settled = record.verdict is Verdict.APPLY or record.step >= trainer.total_steps
        if settled and (context := self._due(trainer)) is not None:
            trainer.save()  # judging takes long, and may end the run
            self._judge(trainer, context)

    def state(self) -> dict[str, Any]:
        known = not math.isnan(self._before)  # not yet in what is saved before the first step
        return {"short": self.short.seq_len, "before": self._before, "judged": self._judged} if known else {}

    def load_state(self, state: dict[str, Any]) -> None:
        if state["short"] != self.short.seq_len:
            why = f"{self.out} was begun with base.promote.short={state['short']}"
            raise UsageError(why, value=self.short.seq_len, fix=f"base.promote.short={state['short']}")
        self._before, self._judged = state["before"], list(state["judged"])

    def _due(self, trainer: Trainer[Any]) -> int | None:
        """The tokens of a row of the phase that has ended and is not judged. Phases go by the data, `cursor`, which may
        be ahead of the steps."""
        done = len(self._judged)
        if done and self._judged[-1]["step"] >= self.steps:
            return None
        next_begins = done + 1 < len(self.phases) and trainer.cursor >= self.phases[done + 1].first_step
        return self.phases[done].seq_len if next_begins or trainer.step >= self.steps else None

    def _judge(self, trainer: Trainer[Any], context: int) -> None:
        measured = {"short": self._score(trainer)}
        if self.promote.criteria.needles:
            measured["needles"] = self._found(trainer, context)
        asked = criteria(self.promote.criteria, self._before, measured["short"], measured.get("needles"))
        failed = [criterion.describe() for criterion in asked if not criterion.met]
        account = {"step": trainer.step, "context": context, **measured, "criteria": [one.to_dict() for one in asked]}
        name = "not_promoted" if failed else "promoted"
        if not trainer.logged(name):  # as it is where the run was ended after this
            trainer.log({name: context, **measured})
        if failed:
            self._write(trainer, failed=account)
            export(trainer, self.leave)
            raise HerdError(
                f"the phase of {context:,} tokens is not promoted at step {trainer.step:,}: {'; '.join(failed)}",
                fix="ask less of it (base.promote.tolerance, base.promote.needles), or begin another run with its"
                f" weights in {self.out / UNPROMOTED}",
            )
        self._judged.append(account)
        self._write(trainer)
        needles = f", needles {100 * measured['needles']:.0f} %" if "needles" in measured else ""
        announce(
            f"rows of {context:,} tokens: short text {self._before:.3f} → {measured['short']:.3f}{needles}: promoted"
        )

    def _write(self, trainer: Trainer[Any], **more: Any) -> None:
        if trainer.world.rank == 0:
            write_json(self.out / FILE, {"short_before": self._before, "judged": self._judged, **more})

    # Rank 0's numbers decide for all: those of other hardware may lie on the other side of a bound.

    def _score(self, trainer: Trainer[Any]) -> float:
        return trainer.world.from_first([score(trainer, self.short)["heldout_bits_per_byte"]])[0]

    def _found(self, trainer: Trainer[Any], context: int) -> float:
        """The share of the hidden numbers that get more than half of the probability."""
        found = [trainer.evaluate([_row(*pair, context)])[0] < math.log(2) for pair in self.promote.hidden(context)]
        return trainer.world.from_first([sum(found) / len(found)])[0]


@contextlib.contextmanager
def _as(trainer: Trainer[Any], shape: LlamaConfig) -> Iterator[None]:
    """The model with the RoPE of another shape."""
    model: Any = trainer.model if trainer.world.pipeline is None else trainer.world.pipeline.model
    own = model.config
    model.config = dataclasses.replace(own, rope_theta=shape.rope_theta, rope_scaling=shape.rope_scaling)
    try:
        yield
    finally:
        model.config = own


def _row(prompt: Sequence[int], answer: Sequence[int], seq_len: int) -> Batch:
    """One row [1, S] of which the answer alone counts; what is left of the row is a document of its own."""
    ids = np.asarray([*prompt, *answer], dtype=np.int64)
    end = len(ids) - 1
    tokens, targets = np.zeros((2, 1, seq_len), dtype=np.int64)
    documents, weights = np.zeros((1, seq_len), dtype=np.int32), np.zeros((1, seq_len), dtype=np.float32)
    tokens[0, :end], targets[0, :end] = ids[:-1], ids[1:]
    documents[0, end:] = 1
    weights[0, len(prompt) - 1 : end] = 1
    return Batch.from_arrays(ArrayBatch(tokens, targets, documents, weights))
