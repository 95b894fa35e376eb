"""Rotary position embedding: queries and keys turned by an angle that grows with their position.

RoFormer (arXiv 2104.09864). Neighbouring pairs (x0, x1), (x2, x3), … turn together, as in Meta's reference; frequencies
and their scaling come from `herd.architecture`, so that every runtime shares them.
Letters: B batch, S sequence, H heads, K head width, J = K/2 pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from herd.architecture import LlamaConfig, attention_scale, rope_frequencies


class Rotation(NamedTuple):
    """Cosine and sine of every pair's angle at every position, float32."""

    cos_BSJ: Tensor
    sin_BSJ: Tensor


def rotation(config: LlamaConfig, positions_BS: Tensor) -> Rotation:
    """The rotation of each position. "dynamic" scaling follows the highest position of the call."""
    scaling = config.rope_scaling
    length = int(positions_BS.max()) + 1 if scaling is not None and scaling.kind == "dynamic" else None
    frequencies_J = torch.tensor(rope_frequencies(config, length), device=positions_BS.device, dtype=torch.float32)
    angles_BSJ = positions_BS.unsqueeze(-1).float() * frequencies_J
    scale = attention_scale(config)
    return Rotation(angles_BSJ.cos() * scale, angles_BSJ.sin() * scale)


def rotate(x_BSHK: Tensor, turn: Rotation) -> Tensor:
    """Turn every pair (x_2j, x_2j+1) by its angle, in float32; returns x's dtype.

    (a, b) → (a·cos - b·sin, a·sin + b·cos), which is the product of complex numbers (a + ib)·(cos + i·sin).
    """
    cos, sin = turn.cos_BSJ.unsqueeze(2), turn.sin_BSJ.unsqueeze(2)
    pairs = torch.unflatten(x_BSHK.float(), -1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler fuses real arithmetic, and has no code for complex numbers
        a, b = pairs.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    else:  # run eagerly, one complex product is five times faster than the strided halves
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x_BSHK.dtype)
