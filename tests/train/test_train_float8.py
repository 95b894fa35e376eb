"""Products in float8: other rounding, the same training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from herd.errors import UsageError
from herd.train import TrainConfig
from herd.train.float8 import float8_products
from tests.train.parallel.cases import Case, Seen, shape, trainer
from tests.train.parallel.launch import launch

pytest.importorskip("torchao", reason="torchao is not installed")


def losses(rank: int, out: Path, **fields: Any) -> None:
    """Some steps on the same rows, and what they cost."""
    parallel = fields.pop("parallel", {})
    seen = Seen()
    loop = trainer(Case("dense", 1, parallel), out / "run", [seen], steps=24, lr=5e-3, **fields)
    rows = loop.source.batch(0)
    loop.source.batch = lambda step: rows  # type: ignore[method-assign]
    for _ in range(24):
        loop.train_step()
    torch.save([step[0] for step in seen.steps], out / f"losses-{rank}.pt")


def test_the_middle_blocks_products_are_replaced_and_no_name_changes() -> None:
    from herd.model import Llama

    model = Llama(shape())
    names = [name for name, _ in model.named_parameters()]
    float8_products(model, torch.device("cpu"))
    assert [name for name, _ in model.named_parameters()] == names
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    changed = {name for name, kind in kinds.items() if kind == "Float8Linear"}
    assert changed == {name for name in kinds if name.startswith(("layers.1.", "layers.2."))}


@pytest.mark.slow
def test_training_follows_that_in_fp32_and_is_not_the_same(tmp_path: Path) -> None:
    for name, fields in (("exact", {}), ("float8", {"float8": True})):
        (tmp_path / name).mkdir()
        losses(0, tmp_path / name, **fields)
    exact, rounded = (torch.tensor(torch.load(tmp_path / name / "losses-0.pt")) for name in ("exact", "float8"))
    assert exact[-1] < 0.6 * exact[0], "there was something to learn"
    assert not torch.equal(exact, rounded)
    assert ((rounded - exact).abs() / exact).max() < 0.03


@pytest.mark.slow
def test_sharded_weights_give_the_same(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    losses(0, tmp_path / "one", float8=True)
    launch(2, "tests.train.test_train_float8:losses", tmp_path, float8=True, parallel={"shard": True})
    one, two = (torch.tensor(torch.load(path / "losses-0.pt")) for path in (tmp_path / "one", tmp_path))
    difference = (two - one).abs() / one
    assert difference[:3].max() < 1e-4, "sums in another order, and what rounding makes of them later"
    assert difference.max() < 0.02


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="3 or more"):
        float8_products(nn.Module(), torch.device("cpu"))
    with pytest.raises(ValueError, match="float8 is not for matrices that are split"):
        TrainConfig(float8=True, parallel={"tp": 2})  # type: ignore[arg-type]
