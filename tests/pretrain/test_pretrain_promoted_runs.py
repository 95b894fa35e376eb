"""How runs whose phases are judged end, go on, and go back."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from herd import checkpoint
from herd.architecture import LlamaConfig
from herd.errors import FileFormatError, HerdError, UsageError
from herd.pretrain import PretrainConfig, run
from herd.pretrain.promoting import Promote, Promotion
from herd.pretrain.promotion import criteria
from herd.pretrain.source import PhasedSource
from herd.tokenizer import Tokenizer
from herd.train import StepRecord, Trainer
from herd.train.callbacks import Verdict
from herd.train.state import StateStore
from tests.pretrain.little import write_corpus
from tests.pretrain.phased import account, asking, lines, phased, promoted

Run = Callable[..., Any]


@pytest.fixture
def go(corpus: Path, words: Tokenizer, shape: LlamaConfig) -> Run:
    """Runs a configuration in a directory, with what is asked of its phases."""

    def start(config: PretrainConfig, out: Path, promote: Promote | None) -> None:
        run(config, shape, corpus, words, out, promote=promote)

    return start


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps whose data was read."""
    found, batch = list[int](), PhasedSource.batch
    monkeypatch.setattr(PhasedSource, "batch", lambda self, step: found.append(step) or batch(self, step))
    return found


def _stop_before(step: int, monkeypatch: pytest.MonkeyPatch, batch: Any = PhasedSource.batch) -> None:
    def stopping(self: PhasedSource, at: int) -> Any:
        if at == step:
            raise KeyboardInterrupt
        return batch(self, at)

    monkeypatch.setattr(PhasedSource, "batch", stopping)


def _verdicts(monkeypatch: pytest.MonkeyPatch, of: dict[int, Verdict]) -> None:
    """What the guard says of steps, each once."""
    monkeypatch.setattr(
        "herd.train.guard.Guard.on_gradients", lambda self, trainer, record: of.pop(record.step, Verdict.APPLY)
    )


def _weights_are_equal(one: Path, other: Path) -> bool:
    with checkpoint.open_checkpoint(one) as first, checkpoint.open_checkpoint(other) as second:
        return all((first[name] == second[name]).all() for name in first)


def test_a_phase_that_is_not_ready_ends_the_run_which_goes_on_when_less_is_asked(
    go: Run,
    read: list[int],
    short: Path,
    words: Tokenizer,
    shape: LlamaConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, out, hidden = phased(short), tmp_path / "judged", asking(words).hidden
    go(config, tmp_path / "whole", None)
    read.clear()

    def again(needles: dict[int, float]) -> None:
        """Ask for other shares in each phase: `criteria` stands for what a run would be asked the next time."""
        asked = iter(needles.values())
        monkeypatch.setattr(
            "herd.pretrain.promoting.criteria",
            lambda one, before, now, found: criteria(
                one.model_copy(update={"needles": next(asked)}), before, now, found
            ),
        )
        go(config, out, Promote(asking(words, needles=1).criteria, hidden))

    for tries in range(2):  # asked the same again, it fails in the same place, and trains nothing
        with pytest.raises(
            HerdError, match="phase 2, with rows of 64 tokens, is not promoted at step 6: needles"
        ) as error:
            again({32: 0, 64: 1} if not tries else {64: 1})
        assert str(out / "unpromoted" / "step-00000006") in str(error.value.fix)
        assert read == list(range(6)) and hidden.asked == [32, 64, 64][: 2 + tries]
        assert promoted(out) == [(3, 32)] and account(out)["failed"]["context"] == 64
    with checkpoint.open_checkpoint(out / "unpromoted" / "step-00000006") as left:
        assert left.config == shape
    again({64: 0, 128: 0})
    assert read == list(range(8)) and hidden.asked == [32, 64, 64, 64, 128]
    assert [line["step"] for line in lines(out) if "lr" in line] == list(range(1, 9))
    told = [(name, line[name]) for line in lines(out) for name in ("promoted", "not_promoted") if name in line]
    assert told == [("promoted", 32), *2 * [("not_promoted", 64)], ("promoted", 64), ("promoted", 128)]
    assert "failed" not in account(out) and promoted(out) == [(3, 32), (6, 64), (7, 128)]
    assert _weights_are_equal(tmp_path / "whole" / "checkpoint", out / "checkpoint")


def test_what_was_promoted_is_not_judged_again(
    go: Run, read: list[int], short: Path, words: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped right after a judgement, and at the end, though now nothing would be good enough."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _stop_before(3, patch)
        go(phased(short), tmp_path, asking(words))
    assert promoted(tmp_path) == [(3, 32)]
    strict = asking(words, needles=1)
    with pytest.raises(HerdError, match="phase 2, with rows of 64 tokens"):
        go(phased(short), tmp_path, strict)
    assert strict.hidden.asked == [64] and promoted(tmp_path) == [(3, 32)]
    go(phased(short), tmp_path, asking(words))
    read.clear()
    go(phased(short), tmp_path, strict)
    assert not read and strict.hidden.asked == [64] and len(promoted(tmp_path)) == 3


def test_a_run_without_annealing_that_has_ended_is_not_judged_again(
    go: Run, short: Path, words: Tokenizer, tmp_path: Path
) -> None:
    go(phased(short, anneal=0), tmp_path, asking(words))
    assert promoted(tmp_path) == [(3, 32), (6, 64), (8, 128)]
    go(phased(short, anneal=0), tmp_path, asking(words, needles=1))


def test_short_text_that_is_lost_ends_the_run_unless_that_is_not_asked(
    go: Run, short: Path, words: Tokenizer, tmp_path: Path
) -> None:
    """At a rate that destroys the model."""
    config = phased(short, lr=0.5)
    with pytest.raises(HerdError, match="is not promoted at step 3: bits per byte of short text"):
        go(config, tmp_path, asking(words))
    go(config, tmp_path, asking(words, tolerance=None))
    assert "failed" not in account(tmp_path)
    first = account(tmp_path)["judged"][0]
    assert first["criteria"] == [] and first["short"] > 2 * account(tmp_path)["short_before"]


def test_text_of_no_likelihood_is_lost(
    go: Run, short: Path, words: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter((1000.0, math.nan, 1000.0, 1000.0, 1000.0))
    monkeypatch.setattr(Promotion, "_nats", lambda self, trainer: next(found))
    with pytest.raises(HerdError, match="not promoted at step 3: bits per byte of short text nan"):
        go(phased(short), tmp_path, asking(words))
    assert math.isnan(account(tmp_path)["failed"]["short"]) and (tmp_path / "unpromoted" / "step-00000003").is_dir()
    found = iter((1000.0, math.nan))
    with pytest.raises(HerdError, match="short text nan, at most inf wanted"):
        go(phased(short), tmp_path / "unasked", asking(words, tolerance=None))
    with pytest.raises(HerdError, match="likelihood of the held-out text is not a finite number"):
        monkeypatch.setattr(Promotion, "_nats", lambda self, trainer: math.nan)
        go(phased(short), tmp_path / "from-nothing", asking(words))


def test_nothing_is_judged_or_saved_at_a_step_that_is_left_out(
    go: Run, short: Path, words: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two phases whose ends are left out are judged together, the last one too."""
    _verdicts(monkeypatch, {3: Verdict.SKIP, 4: Verdict.SKIP, 6: Verdict.SKIP})
    asked, saved, save = asking(words, needles=0.01), list[int](), StateStore.save
    monkeypatch.setattr(StateStore, "save", lambda self, step, *rest: saved.append(step) or save(self, step, *rest))
    go(phased(short), tmp_path, asked)
    assert saved == [0, 5, 7, 8]
    assert promoted(tmp_path) == [(5, 32), (7, 64), (7, 128)] and asked.hidden.asked == [32, 64, 128]


def test_a_run_that_goes_back_keeps_what_was_promoted_before(
    go: Run, short: Path, words: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 8 to the newest state, of step 7: nothing is judged twice."""
    _verdicts(monkeypatch, {8: Verdict.ROLL_BACK})
    asked = asking(words, needles=0.01)
    go(phased(short), tmp_path, asked)
    assert any(line.get("event") == "rollback" for line in lines(tmp_path))
    assert promoted(tmp_path) == [(3, 32), (6, 64), (7, 128)] and asked.hidden.asked == [32, 64, 128]


def test_a_run_that_goes_back_behind_a_promotion_earns_it_again(
    go: Run, short: Path, words: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest state is damaged when the run goes back from step 7, so that it is at step 3 again; the rows of the
    phase between have been read, and are left out."""
    bad = [7]

    def look(self: Any, trainer: Trainer[Any], record: StepRecord) -> Verdict:
        if record.step not in bad:
            return Verdict.APPLY
        bad.clear()
        (tmp_path / "state" / "step-00000006" / "state.json").write_text("{")
        return Verdict.ROLL_BACK

    monkeypatch.setattr("herd.train.guard.Guard.on_gradients", look)
    asked = asking(words, needles=0.01)
    go(phased(short, keep=3), tmp_path, asked)
    assert promoted(tmp_path) == [(3, 32), (4, 64), (7, 128)] and asked.hidden.asked == [32, 64, 64, 128]


def test_what_was_promoted_behind_the_state_is_judged_again(
    go: Run, short: Path, words: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest state is damaged, and so is what was known of it."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _stop_before(6, patch)
        go(phased(short), tmp_path, asking(words))
    assert promoted(tmp_path) == [(3, 32), (6, 64)]
    (tmp_path / "state" / "step-00000006" / "state.json").write_text("{")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _stop_before(3, patch)
        go(phased(short), tmp_path, asking(words))
    assert promoted(tmp_path) == [(3, 32)]
    asked = asking(words, needles=0.01)
    go(phased(short), tmp_path, asked)
    assert promoted(tmp_path) == [(3, 32), (6, 64), (7, 128)] and asked.hidden.asked == [64, 128]


def test_a_state_that_could_not_be_written_is_not_promised(
    go: Run, short: Path, words: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = StateStore.save

    def full(self: StateStore, step: int, *rest: Any) -> Path:
        if step == 3:
            raise OSError(28, "No space left on device")
        return save(self, step, *rest)

    monkeypatch.setattr(StateStore, "save", full)
    with pytest.raises(OSError, match="No space left"):
        go(phased(short, checkpoint_background=True), tmp_path, asking(words, needles=1))


def test_a_run_is_judged_from_its_start_or_never(
    go: Run, corpus: Path, words: Tokenizer, shape: LlamaConfig, short: Path, tmp_path: Path
) -> None:
    """By the same text, in the same windows, and not without its account."""
    out = tmp_path / "with"
    with pytest.raises(HerdError, match="phase 1, with rows of 32 tokens"):
        go(phased(short), out, asking(words, needles=1))
    with pytest.raises(UsageError, match=r"windows of 32 tokens; got 16; to fix: base\.promote\.short=32"):
        go(phased(short), out, asking(words, short=16))
    with pytest.raises(UsageError, match="was trained with promote; to fix: go on with it"):
        go(phased(short), out, None)
    other = write_corpus(tmp_path / "other", count=11, train=60, heldout=6)
    shutil.copy(corpus / "train.jsonl", other)
    with pytest.raises(
        UsageError, match=r"other held-out text; got [\d,]+ bytes, [\d,]+ tokens; allowed: [\d,]+ bytes"
    ):
        run(phased(short), shape, other, words, out, promote=asking(words))
    (out / "promotion.json").unlink()
    with pytest.raises(FileFormatError, match="is missing: it alone tells"):
        go(phased(short), out, asking(words))
    go(phased(short), tmp_path / "without", None)
    with pytest.raises(UsageError, match=r"begun without promote.*; to fix: base\.promote=null"):
        go(phased(short), tmp_path / "without", asking(words))
