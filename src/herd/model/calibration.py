"""What a model's matrices are multiplied by, on some text: the importance that quantisation weighs errors with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from herd.model.llama import Llama
from herd.model.moe import Experts, groups


@torch.inference_mode()
def input_squares(model: Llama, sequences: Iterable[Sequence[int]]) -> dict[str, npt.NDArray[np.float32]]:
    """Canonical name of each matrix → mean square of every input it had, float32 [in]; of stacked experts, [E, in].

    An error e in column k of a weight adds e·x_k to an output, so its expected square is E[x_k²]·e². An expert's mean
    is over all tokens, not only its own: only the sizes of columns beside each other count. Zeros: it had no token.
    """
    sums: dict[str, Tensor] = {}
    n_tokens = 0

    def count(name: str, squares: Tensor) -> None:
        sums[name] = squares if name not in sums else sums[name] + squares

    def watch(name: str) -> Any:
        return lambda _, inputs: count(f"{name}.weight", _squares(inputs[0]))

    def watch_experts(name: str) -> Any:
        def add(experts: Experts, inputs: tuple[Tensor, Tensor]) -> None:
            x_TD, counts_E = inputs
            for matrices, x in ((("w1", "w3"), x_TD), (("w2",), experts.hidden(x_TD, counts_E))):
                squares = torch.zeros(len(counts_E), x.shape[-1], dtype=torch.float64)
                for e, start, end in groups(counts_E):
                    squares[e] = _squares(x[start:end])
                for matrix in matrices:
                    count(f"{name}.{matrix}", squares)

        return add

    hooks = [
        module.register_forward_pre_hook(watch(name) if isinstance(module, nn.Linear) else watch_experts(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Experts)
    ]
    head = "embed.weight" if model.config.tied_embeddings else "output.weight"
    try:
        for ids in sequences:
            last_BSD = model.hidden(torch.tensor([list(ids)]))
            count(head, _squares(last_BSD))
            n_tokens += len(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / n_tokens).float().numpy() for name, total in sums.items()}


def _squares(x: Tensor) -> Tensor:
    """Sum of squares over all axes but the last."""
    return x.float().square().flatten(0, -2).sum(0).double()
