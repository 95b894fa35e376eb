"""How many steps fit into a time: the arithmetic, and that measuring leaves the run as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from herd import model as models  # noqa: E402
from herd.architecture import LlamaConfig  # noqa: E402
from herd.errors import ResourceError  # noqa: E402
from herd.train import Batch, TrainConfig, Trainer, next_token_loss  # noqa: E402
from herd.train.budget import fitting_steps, step_seconds  # noqa: E402

SHAPE = LlamaConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=64, vocab_size=64)


class Random:
    def batch(self, step: int) -> list[Batch]:
        tokens = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(step))
        return [Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(4, 16, dtype=torch.int32), torch.ones(4, 16))]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_measuring_leaves_no_trace(optimizer: str, tmp_path: Path) -> None:
    llama = models.Llama(SHAPE)
    llama.init_weights(0)
    before = {key: value.clone() for key, value in llama.state_dict().items()}
    config = TrainConfig.model_validate({"optimizer": optimizer, "seq_len": 16, "batch_size": 4, "compile": "off"})
    trainer: Trainer[Batch] = Trainer(llama, next_token_loss, Random(), config, tmp_path)
    assert 0 < step_seconds(trainer, 2) < 10
    assert all(torch.equal(before[key], value) for key, value in llama.state_dict().items())
    assert trainer.step == trainer.cursor == 0
    assert not trainer.optimizer.state(llama) and all(p.grad is None for p in llama.parameters())


def test_steps_that_fit() -> None:
    assert fitting_steps(100.0, 0.5, 10**6) == 190
    assert fitting_steps(100.0, 0.5, 50) == 50
    with pytest.raises(ResourceError, match=r"only 4 training steps of 20.0 s fit.*max_minutes"):
        fitting_steps(100.0, 20.0, 10**6)
    with pytest.raises(ResourceError, match="only 0 training steps"):
        fitting_steps(-5.0, 1.0, 100)
