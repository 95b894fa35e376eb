"""A run whose rows grow goes on to the next phase only when the model is ready for it (arXiv 2407.21783 §3.4.2).

Where a phase ends, and where annealing begins or the run ends, the training ranks themselves judge the model as it is
spread over them, with two criteria of `herd.pretrain.promotion`: short text is read as by the model that the run begins
with, and the numbers hidden in texts up to the phase's length are found. A number counts as found when the whole of it
has more than half of the probability, -ln p < ln 2. Greedy decoding then says it, so this asks at least as much as
`herd needle` does, and it is one forward pass a number, on any mesh. A phase is judged after the first step that is
applied at or behind its end: where the last ones are left out, a few of the next come first. (A run that is ended among
those is judged where it was ended, when it goes on.)

promotion.json is the account: the short_text that is read, short_before, and `judged`, the phases that were promoted;
of one that was not, `failed`. What was promoted is known from there, as the state of a step is written before its phase
is judged; the state has short_text and short_before.
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
from herd.errors import FileFormatError, HerdError, UsageError
from herd.files import read_json, write_json
from herd.pretrain.config import Criteria
from herd.pretrain.phases import Phases
from herd.pretrain.promotion import criteria
from herd.progress import track
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
    of the first phase has, and the first model's context at most. `lengths`: how many lengths numbers are hidden at,
    evenly up to that of the phase's rows; at each of them as many must be found. `numbers`: how many `hidden` gives at
    a length, for who watches."""

    criteria: Criteria
    hidden: Hidden
    short: int | None = None
    lengths: int = 1
    numbers: int | None = None


@dataclass
class Promotion(Callback):
    """Judges the phases of a run that lasts `steps` steps before it anneals; `leave(place, weights)` writes those of
    one that failed, on rank 0, below out/unpromoted.

    `first`: the model that the run begins with, whose RoPE may be another one; `windows`: short text. What is asked may
    change while a run is interrupted. Raises HerdError where a criterion is not met, with the state saved: the same run
    goes on there when less is asked.
    """

    promote: Promote
    phases: Phases
    steps: int
    windows: EvaluationWindows
    first: LlamaConfig
    out: Path
    leave: Callable[[Path, Arrays], object]
    name = "promote"
    last = True
    _judged: list[dict[str, Any]] = field(default_factory=list)
    """The phases that are promoted, in order; on other ranks than the first with their "step" alone."""
    _before: float = math.nan

    def on_start(self, trainer: Trainer[Any]) -> None:
        if trainer.step == 0:
            with _as(trainer, self.first):
                self._before, self._judged = self.windows.bits_per_byte(self._nats(trainer)), []
            self._write(trainer)
        elif math.isnan(self._before):
            what = f"{self.out} was begun without promote: how it read short text is not known"
            raise UsageError(what, fix="base.promote=null")
        else:
            self._read(trainer)
            self._judge_ended(trainer)

    def on_gradients(self, trainer: Trainer[Any], record: StepRecord) -> Verdict:
        # Where the run went back, what was promoted at this step or later is gone.
        kept = [one for one in self._judged if one["step"] < record.step]
        if len(kept) < len(self._judged):
            self._judged = kept
            self._write(trainer)
        return Verdict.APPLY

    def on_step(self, trainer: Trainer[Any], record: StepRecord) -> None:
        # Nothing is saved while steps are skipped: going back is to lead behind the trouble.
        if record.verdict is Verdict.APPLY or record.step >= trainer.total_steps:
            self._judge_ended(trainer)

    def state(self) -> dict[str, Any]:
        known = not math.isnan(self._before)  # not yet in what is saved before the first step
        return {"short_text": self._text(), "short_before": self._before} if known else {}

    def load_state(self, state: dict[str, Any]) -> None:
        then, now = state["short_text"], self._text()
        if then["window"] != now["window"]:
            what = f"{self.out} was begun with short text in windows of {then['window']} tokens"
            raise UsageError(what, value=now["window"], fix=f"base.promote.short={then['window']}")
        if then != now:
            what = f"{self.out} was begun with other held-out text"
            raise UsageError(what, value=_told(now), allowed=_told(then), fix="the text as it was")
        self._before = state["short_before"]

    def _judge_ended(self, trainer: Trainer[Any]) -> None:
        """Phases go by the data, `cursor`, which may be ahead of the steps."""
        ended = self.phases.number(trainer.cursor) + (trainer.step >= self.steps)
        if ended > len(self._judged):
            trainer.save()  # judging takes long, and may end the run
        for number in range(len(self._judged), ended):
            self._judge(trainer, number)

    def _judge(self, trainer: Trainer[Any], number: int) -> None:
        context, nats = self.phases[number].seq_len, self._nats(trainer)
        measured = {"short": self.windows.bits_per_byte(nats) if math.isfinite(nats) else math.nan}
        if self.promote.criteria.needles:
            measured["needles"] = self._found(trainer, context)
        asked = criteria(self.promote.criteria, self._before, measured["short"], measured.get("needles"))
        failed = [criterion.describe() for criterion in asked if not criterion.met]
        account: dict[str, Any] = {"phase": number + 1, "step": trainer.step, "context": context, **measured}
        account |= {"criteria": [criterion.to_dict() for criterion in asked]}
        trainer.log({"not_promoted" if failed else "promoted": context, **measured})
        if failed:
            self._write(trainer, failed=account)
            place = self.out / UNPROMOTED / f"step-{trainer.step:08d}"
            export(trainer, lambda weights: self.leave(place, weights))
            trainer.saver.finish()  # what the message promises
            raise HerdError(
                f"phase {number + 1}, with rows of {context:,} tokens, is not promoted at step {trainer.step:,}:"
                f" {'; '.join(failed)}",
                fix="base.promote.tolerance=… or base.promote.needles=… asks less and goes on from here; or begin"
                f" another run with the weights in {place}",
            )
        self._judged.append(account)
        self._write(trainer)
        needles = f", needles {100 * measured['needles']:.0f} %" if "needles" in measured else ""
        announce(
            f"rows of {context:,} tokens: short text {self._before:.3f} → {measured['short']:.3f}{needles}: promoted"
        )

    def _text(self) -> dict[str, int]:
        """What short text is read, and in windows of how many tokens."""
        return {"window": self.windows.seq_len, "bytes": self.windows.n_bytes, "tokens": self.windows.n_targets}

    def _write(self, trainer: Trainer[Any], **more: Any) -> None:
        account = {"short_text": self._text(), "short_before": self._before, "judged": self._judged}
        trainer.world.first(lambda: write_json(self.out / FILE, account | more))

    def _read(self, trainer: Trainer[Any]) -> None:
        """Take up the account as far as the state goes."""
        known = trainer.world.first(lambda: _promoted(self.out / FILE)) or []
        self._judged = [one for one in known if one["step"] <= trainer.step]
        steps = trainer.world.from_first([one["step"] for one in self._judged])
        if trainer.world.rank:
            self._judged = [{"step": int(step)} for step in steps]
        self._write(trainer)

    # Rank 0's numbers decide for all: those of other hardware may lie on the other side of a bound.

    def _nats(self, trainer: Trainer[Any]) -> float:
        nats, _ = trainer.evaluate(Batch.from_arrays(window.batch) for window in self.windows)
        return trainer.world.from_first([nats])[0]

    def _found(self, trainer: Trainer[Any], context: int) -> float:
        """The share of the hidden numbers that get more than half of the probability, at the length with the fewest."""
        shares = []
        for number in range(1, self.promote.lengths + 1):
            length = context * number // self.promote.lengths
            pairs = track(self.promote.hidden(length), total=self.promote.numbers, label=f"hidden in {length:,} tokens")
            found = [trainer.evaluate([_row(*pair, context)])[0] < math.log(2) for pair in pairs]
            shares.append(sum(found) / len(found))
        return trainer.world.from_first([min(shares)])[0]


def _promoted(file: Path) -> list[dict[str, Any]]:
    """The promoted phases of an account. Raises FileFormatError where there is none."""
    if not file.exists():
        fix = f"put it back, or remove {file.parent} to begin anew"
        raise FileFormatError("is missing: it alone tells which phases were promoted", file=file, fix=fix)
    return list(read_json(file)["judged"])


def _told(text: dict[str, int]) -> str:
    return f"{text['bytes']:,} bytes, {text['tokens']:,} tokens"


@contextlib.contextmanager
def _as(trainer: Trainer[Any], shape: LlamaConfig) -> Iterator[None]:
    """The model with the RoPE of another shape."""
    model: Any = trainer.model
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
