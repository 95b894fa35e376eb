"""Texts to score as windows of at most a context, and what is found of each window put together again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from herd.engine.prompts import windowed
from herd.engine.sampler import BrokenLogits


class Windows:
    """`tokens`: ids of each window of each sequence. Further windows see `overlap` tokens of what came before."""

    def __init__(self, sequences: Sequence[list[int]], context: int, overlap: int | None) -> None:
        self.tokens: list[list[int]] = []
        self._n_sequences = len(sequences)
        self._owners: list[tuple[int, int]] = []  # per window: index of the sequence, first target that counts
        for i, ids in enumerate(sequences):
            for start, fresh in windowed(len(ids), context, overlap):
                self.tokens.append(ids[start : start + context])
                self._owners.append((i, fresh - start - 1))

    def joined(self, results: Sequence[npt.NDArray[np.float32]]) -> list[list[float]]:
        """Of each sequence the log-probabilities of its tokens from the second on, each once.

        `results`: the same of each window, [window length - 1]. Raises BrokenLogits where they are not all numbers.
        """
        broken = [i for i, result in enumerate(results) if not np.isfinite(result).all()]
        if broken:
            raise BrokenLogits(broken)
        logprobs: list[list[float]] = [[] for _ in range(self._n_sequences)]
        for (i, skip), result in zip(self._owners, results, strict=True):
            logprobs[i] += result[skip:].tolist()
        return logprobs
