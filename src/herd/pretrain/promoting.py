"""A run whose rows grow goes on to the next phase only when the model is ready for it (arXiv 2407.21783 §3.4.2).

Where a phase ends, and where annealing begins or the run ends, the training ranks themselves judge the model as it is
spread over them, with two criteria of `herd.pretrain.promotion`: short text is read as before the run, and the numbers
hidden in rows of the phase's length are found. A number counts as found when the whole of it has more than half of
the probability, -ln p < ln 2. Greedy decoding then says it, so this asks at least as much as `herd needle` does, and it
is one forward pass a number, on any mesh. The account is promotion.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from herd.corpus import Batch as ArrayBatch
from herd.corpus import EvaluationWindows
from herd.errors import HerdError, UsageError
from herd.files import read_json, write_json
from herd.pretrain.config import Criteria
from herd.pretrain.heldout import score
from herd.pretrain.phases import Phases
from herd.pretrain.promotion import criteria
from herd.train.announce import announce
from herd.train.batches import Batch
from herd.train.callbacks import Callback, StepRecord
from herd.train.export import Arrays, export, step_export
from herd.train.trainer import Trainer

FILE = "promotion.json"
Hidden = Callable[[int], Iterable[tuple[Sequence[int], Sequence[int]]]]
"""length → (ids of a prompt, ids of its answer) for each number hidden in texts of so many tokens, answers included."""


@dataclass(frozen=True)
class Promote:
    """What each phase is judged by. `short`: tokens of the windows that short text is read in; None: of a first row."""

    criteria: Criteria
    hidden: Hidden
    short: int | None = None


@dataclass
class Promotion(Callback):
    """Judges the phases of a run that lasts `steps` steps before it anneals; `leave(step, weights)` writes the weights
    of one that failed, on rank 0.

    Raises HerdError where a criterion is not met, with the state saved: the same run goes on there when less is asked.
    """

    promote: Promote
    phases: Phases
    steps: int
    short: EvaluationWindows
    out: Path
    leave: Callable[[int, Arrays], None]
    name = "promotion"
    last = True
    judged: list[dict[str, Any]] = field(default_factory=list)
    """Of each phase: what was measured, and the criteria that it met."""
    _before: float = math.nan

    def on_start(self, trainer: Trainer[Any]) -> None:
        if trainer.step == 0:
            self.judged, self._before = [], score(trainer, self.short)["heldout_bits_per_byte"]
            self._write(trainer)
            return
        account = read_json(self.out / FILE) if (self.out / FILE).is_file() else None
        if account is None:
            raise UsageError(
                f"{self.out} was begun without promote: how it read short text is not known", fix="promote: null"
            )
        self._before = account["short_before"]
        self.judged = [one for one in account["judged"] if one["step"] <= trainer.step]
        self._judge_due(trainer)

    def on_step(self, trainer: Trainer[Any], record: StepRecord) -> None:
        if self._due(trainer) is not None:
            trainer.save()  # judging takes long, and may end the run
            self._judge_due(trainer)

    def _due(self, trainer: Trainer[Any]) -> int | None:
        """The tokens of a row of the phase that has ended and is not judged. Phases go by the data, `cursor`, which may
        be ahead of the steps."""
        done = len(self.judged)
        if done and self.judged[-1]["step"] >= self.steps:
            return None
        next_begins = done + 1 < len(self.phases) and trainer.cursor >= self.phases[done + 1].first_step
        return self.phases[done].seq_len if next_begins or trainer.step >= self.steps else None

    def _judge_due(self, trainer: Trainer[Any]) -> None:
        context = self._due(trainer)
        if context is None:
            return
        found = self._found(trainer, context) if self.promote.criteria.needles else None
        short = score(trainer, self.short)["heldout_bits_per_byte"]
        asked = criteria(self.promote.criteria, self._before, short, found)
        measured = {"short": short} | ({} if found is None else {"needles": found})
        if failed := [criterion.describe() for criterion in asked if not criterion.met]:
            export(trainer, lambda weights: self.leave(trainer.step, weights))
            raise HerdError(
                f"the phase of {context:,} tokens is not promoted at step {trainer.step:,}: {'; '.join(failed)}",
                fix="ask less (promote.tolerance, promote.needles) and go on by the same command; or train more, in a"
                f" run that begins with init_from={step_export(self.out, trainer.step)}",
            )
        self.judged.append(
            {"step": trainer.step, "context": context, **measured, "criteria": [one.to_dict() for one in asked]}
        )
        trainer.log({"promoted": context, **measured})
        self._write(trainer)
        needles = "" if found is None else f", needles {100 * found:.0f} %"
        announce(f"rows of {context:,} tokens: short text {self._before:.3f} → {short:.3f}{needles}: promoted")

    def _found(self, trainer: Trainer[Any], context: int) -> float:
        """The share of the hidden numbers that get more than half of the probability."""
        found = [trainer.evaluate([_row(*pair, context)])[0] < math.log(2) for pair in self.promote.hidden(context)]
        return sum(found) / len(found)

    def _write(self, trainer: Trainer[Any]) -> None:
        if trainer.world.rank == 0:
            write_json(self.out / FILE, {"short_before": self._before, "judged": self.judged})


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
