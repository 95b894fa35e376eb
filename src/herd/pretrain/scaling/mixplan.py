"""Which mixes to train for a mixing law: ones that lie far from each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from herd.errors import UsageError
from herd.pretrain.scaling.laws import Array

_CANDIDATES = 4000


def spread_mixes(
    sources: Sequence[str], count: int, *, least: float = 0.05, begin: Sequence[Mapping[str, float]] = (), seed: int = 0
) -> list[dict[str, float]]:
    """`count` mixes that lie far from each other, the ones of `begin` among them; no other share is below `least`.

    Each next one is, of some thousand random mixes, that whose nearest one so far is farthest away. Shares have three
    decimals. Raises UsageError where there is no room for such mixes.
    """
    if len(sources) < 2:
        raise UsageError("a mix needs two sources or more", value=", ".join(sources))
    room = 1 - least * len(sources)
    if not (least >= 0 and room > 0):
        raise UsageError("the least share leaves no room to mix", value=least, allowed=f"below {1 / len(sources):.3g}")
    chosen = [np.array([mix[name] for name in sources]) for mix in begin][:count]
    rng = np.random.default_rng(seed)
    candidates = least + room * rng.dirichlet(np.ones(len(sources)), _CANDIDATES)
    if not chosen:
        chosen.append(np.full(len(sources), 1 / len(sources)))
    nearest = np.min([np.linalg.norm(candidates - mix, axis=1) for mix in chosen], axis=0)
    while len(chosen) < count:
        chosen.append(candidates[nearest.argmax()])
        nearest = np.minimum(nearest, np.linalg.norm(candidates - chosen[-1], axis=1))
    return [_rounded(sources, mix) for mix in chosen]


def _rounded(sources: Sequence[str], mix: Array) -> dict[str, float]:
    """Three decimals, of which the largest share takes what is left."""
    shares = {name: round(float(share), 3) for name, share in zip(sources, mix, strict=True)}
    largest = max(shares, key=lambda name: shares[name])
    rest = sum(share for name, share in shares.items() if name != largest)
    return shares | {largest: round(1 - rest, 3)}
