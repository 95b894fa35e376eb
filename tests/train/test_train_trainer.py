"""The loop on a real, tiny Llama: normalisation, what a step does, metrics, precision, compilation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from herd.architecture import LlamaConfig
from herd.corpus import PackedExamples, pack_examples
from herd.errors import UsageError
from herd.model import Llama
from herd.train import Callback, PackedSource, StepRecord, TrainConfig, Trainer, Verdict, next_token_loss
from herd.train import trainer as trainer_module

SHAPE = LlamaConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=48, vocab_size=64, context_length=64
)


def _rows(batch_size: int = 8, share: float = 0.5) -> PackedExamples:
    """Ragged documents whose next token is a function of this one, with uneven weights."""
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(300):
        start, n = int(rng.integers(64)), int(rng.integers(3, 33))
        examples.append(((start + 5 * np.arange(n)) % 64, rng.random(n) < rng.random() * 2 * share))
    return pack_examples(examples, seq_len=32, batch_size=batch_size, seed=1)


def _llama() -> Llama:
    model = Llama(SHAPE)
    model.init_weights(0)
    return model


Make = Callable[..., Trainer[Any]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def build(folder: str = "run", callbacks: tuple[Callback, ...] = (), **fields: Any) -> Trainer[Any]:
        settings = {"steps": 20, "seq_len": 32, "batch_size": 8, "micro_batch": 8, "lr": 0.01, "precision": "fp32"}
        config = TrainConfig.model_validate(settings | {"compile": "off", "checkpoint_seconds": 0} | fields)
        source = PackedSource(_rows(config.batch_size), config.micro_batch_rows)
        return Trainer(_llama(), next_token_loss, source, config, tmp_path / folder, callbacks)

    return build


def _lines(trainer: Trainer[Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (trainer.out_dir / "metrics.jsonl").read_text().splitlines()]


def test_eight_micro_batches_of_one_give_the_gradient_of_one_of_eight(make: Make) -> None:
    whole, parts = make(micro_batch=8), make(micro_batch=1)
    expected = whole.gradients(3)
    found = parts.gradients(3)
    assert found == pytest.approx(expected, rel=1e-5)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_mean_over_supervised_targets_and_not_a_mean_of_means(make: Make) -> None:
    trainer = make(micro_batch=1)
    batches = trainer.source.batch(3)
    model = _llama()
    losses, means = [], []
    for batch in batches:
        logits = model(batch.tokens_BS, document_ids_BS=batch.document_ids_BS).flatten(0, 1)
        every = functional.cross_entropy(logits, batch.targets_BS.flatten(), reduction="none")
        supervised = every[batch.weights_BS.flatten() > 0]
        losses.append(supervised)
        means.append(supervised.mean())
    loss, norm, tokens, weight = trainer.gradients(3)
    right = torch.cat(losses).mean()
    assert loss == pytest.approx(right.item(), rel=1e-5)
    assert abs(torch.stack(means).mean() - right) > 1e-4  # ragged weights: the two differ
    assert weight == sum(len(part) for part in losses) and tokens == 8 * 32
    right.backward()
    expected = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]))
    assert norm == pytest.approx(expected.item(), rel=1e-4)


def test_a_step_is_clipped_adamw_at_the_scheduled_rate(make: Make) -> None:
    trainer = make(steps=10, warmup=4, clip=0.01, micro_batch=2)
    reference = _llama()
    groups = [
        {"params": [p for p in reference.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in reference.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step, batch in enumerate(PackedSource(_rows(), 8).batch(step)[0] for step in range(3)):
        trainer.train_step()
        loss, weight = next_token_loss(reference, batch)
        (loss / weight).backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
        assert norm > 0.01
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1) / 4
        optimizer.step()
        optimizer.zero_grad()
    for (name, a), b in zip(trainer.model.named_parameters(), reference.parameters(), strict=True):
        # A first AdamW step moves a weight by the sign of its gradient, so rounding of tiny gradients shows.
        assert (a - b).abs().mean() < 1e-4, name


def test_it_learns_and_says_so(make: Make) -> None:
    trainer = make(steps=60, log_every=20)
    result = trainer.fit()
    assert result.loss < 1.2 < 3.5
    assert result.steps == 60 and result.tokens == 60 * 8 * 32
    lines = _lines(trainer)
    assert [line["step"] for line in lines] == [20, 40, 60]
    assert lines[0]["loss"] > lines[-1]["loss"]
    last = lines[-1]
    assert last["tokens"] == result.tokens and last["supervised_tokens"] == result.supervised_tokens
    assert last["lr"] == pytest.approx(0.001) and last["grad_norm"] > 0 and last["memory_bytes"] > 1e7
    assert 0 < last["mfu"] < 1 and last["tokens_per_second"] > 0


def test_weights_outside_the_gradient_stay_as_they_are(make: Make) -> None:
    trainer = make(steps=3)
    trainer.model.requires_grad_(False)
    trainer.model.layers[1].requires_grad_(True)
    trainer.optimizer = trainer_module.build_optimizer(trainer.model, trainer.config)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.fit()
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name]) == (not name.startswith("layers.1.")), name


def test_the_size_of_micro_batches_hardly_changes_a_run(make: Make) -> None:
    one, other = make("a", micro_batch=8), make("b", micro_batch=3)
    assert one.fit().loss == pytest.approx(other.fit().loss, rel=1e-3)


def test_bf16_follows_fp32_and_keeps_fp32_weights(make: Make) -> None:
    exact, rough = make("a", steps=40), make("b", steps=40, precision="bf16")
    assert rough.fit().loss == pytest.approx(exact.fit().loss, rel=0.05)
    assert {p.dtype for p in rough.model.parameters()} == {torch.float32}
    state = rough.optimizer.state(rough.model)
    assert {entry["exp_avg"].dtype for entry in state.values()} == {torch.float32}


def test_evaluate_is_the_loss_without_a_trace(make: Make) -> None:
    trainer = make(micro_batch=2)
    batches = trainer.source.batch(9)
    random_state = torch.get_rng_state()
    loss_sum, weight = trainer.evaluate(batches)
    assert torch.equal(torch.get_rng_state(), random_state)
    loss, _, _, expected = trainer.gradients(9)
    assert loss_sum / weight == pytest.approx(loss, rel=1e-5) and weight == expected
    assert trainer.model.training


def test_callbacks_see_every_step_in_order(make: Make) -> None:
    class Recorder(Callback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_start(self, trainer: Trainer[Any]) -> None:
            self.seen.append("start")

        def on_gradients(self, trainer: Trainer[Any], record: StepRecord) -> Verdict:
            self.seen.append(("gradients", record.step))
            return Verdict.SKIP if record.step == 2 else Verdict.APPLY

        def on_step(self, trainer: Trainer[Any], record: StepRecord) -> None:
            assert trainer.step == record.step
            self.seen.append((record.verdict.name, record.step))

        def on_finish(self, trainer: Trainer[Any], result: Any) -> None:
            self.seen.append("finish")

    recorder = Recorder()
    make(steps=3, callbacks=(recorder,)).fit()
    steps = [("gradients", 1), ("APPLY", 1), ("gradients", 2), ("SKIP", 2), ("gradients", 3), ("APPLY", 3)]
    assert recorder.seen == ["start", *steps, "finish"]


def test_a_failing_compiler_is_announced_and_left_behind(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise torch._inductor.exc.CppCompileError(["c++"], "no such compiler")

    expected = make("eager", steps=2).fit().loss
    trainer = make("compiled", steps=2, compile="on")
    trainer.compile()
    for block in trainer.model.layers:
        block._compiled_call_impl = broken
    assert trainer.fit().loss == expected
    assert "compiling failed, going on without it" in capfd.readouterr().err
    assert not trainer.blocks.active


def test_an_error_of_the_model_is_not_taken_for_one_of_the_compiler(make: Make) -> None:
    def too_much(model: Any, batch: Any) -> Any:
        raise torch.OutOfMemoryError("no memory for the activations")

    trainer = make(compile="on")
    trainer.loss_fn = too_much
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit()
    assert trainer.blocks.active


def test_compile_auto_is_for_long_runs_only(make: Make) -> None:
    trainer = make(compile="auto")
    trainer.compile()
    assert not trainer.blocks.active
    trainer = make(compile="auto", steps=10**7)
    trainer.compile()
    assert trainer.blocks.active == bool(trainer_module.worth_compiling(trainer.config, trainer.flops_per_token()))


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(make: Make) -> None:
    eager, compiled = make("a", steps=10), make("b", steps=10, compile="on")
    assert compiled.fit().loss == pytest.approx(eager.fit().loss, rel=1e-4)
    assert compiled.blocks.active


def test_a_missing_gpu_is_a_clear_error(make: Make) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match="no CUDA device"):
        make(device="cuda")
