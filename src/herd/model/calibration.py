"""What a model's matrices are multiplied by, on some text: the importance that quantisation weighs errors with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from herd.model.llama import Llama


@torch.inference_mode()
def input_squares(model: Llama, sequences: Iterable[Sequence[int]]) -> dict[str, npt.NDArray[np.float32]]:
    """Canonical name of each matrix → mean square of every input it had, float32 [in].

    An error e in column k of a weight adds e·x_k to an output, so its expected square is E[x_k²]·e². The stacked
    matrices of a mixture's experts are not covered: each expert has inputs of its own.
    """
    sums: dict[str, Tensor] = {}
    n_tokens = 0

    def watch(name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].float().square().flatten(0, -2).sum(0).double()
            sums[name] = squares if name not in sums else sums[name] + squares

        return add

    hooks = [
        module.register_forward_pre_hook(watch(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    head = "embed.weight" if model.config.tied_embeddings else "output.weight"
    try:
        for ids in sequences:
            last_BSD = model.hidden(torch.tensor([list(ids)]))
            squares = last_BSD.float().square().flatten(0, 1).sum(0).double()
            sums[head] = sums[head] + squares if head in sums else squares
            n_tokens += len(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / n_tokens).float().numpy() for name, total in sums.items()}
