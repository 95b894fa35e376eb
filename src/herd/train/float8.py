"""Products of the blocks in float8, through torchao: twice the rate of bf16 on GPUs from compute capability 8.9 on.

Rowwise scales, computed anew for every product; weights, gradients' sums and everything else stay as they are. The
first and the last block keep bf16, as in the Llama 3 paper's float8 inference (section 6.2), and attention does too.
Elsewhere than on such a GPU the rounding is emulated: the same training, slower.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from herd.errors import UsageError
from herd.train.announce import announce


def float8_products(model: nn.Module, device: torch.device) -> None:
    """Replace the linear layers inside the model's blocks, in place; weights keep their names.

    Raises UsageError without torchao, and for a model without blocks in between.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UsageError(
            "float8 training needs torchao, which is not installed", fix="pip install 'torchao>=0.18'"
        ) from None
    count = len(getattr(model, "layers", ()))
    if count < 3:
        raise UsageError("float8 leaves out the first and the last layer", value=f"{count} layers", allowed="3 or more")
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    if not native:
        announce("float8 is emulated on this device: the rounding is real, the speed is not")
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=not native)

    def chosen(module: nn.Module, name: str) -> bool:
        place = name.split(".")
        inside = place[0] == "layers" and 0 < int(place[1]) < count - 1
        # The matrix unit takes multiples of 16; a router's few columns are not worth it.
        return (
            inside
            and isinstance(module, nn.Linear)
            and module.in_features % 16 == module.out_features % 16 == 0
            and "router" not in place
        )

    convert_to_float8_training(model, config=config, module_filter_fn=chosen)
