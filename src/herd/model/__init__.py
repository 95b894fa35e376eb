"""model: token ids → logits, in PyTorch, for every Llama's text decoder."""

from herd.model.attention import LOWERINGS, attend
from herd.model.attention_mask import AttentionMask, KeyRanges
from herd.model.cache import KVCache
from herd.model.calibration import input_squares
from herd.model.compare import largest_difference
from herd.model.llama import Llama, initial_weight
from herd.model.load import from_arrays, load, read_weight, state_arrays, to_array, to_tensor

__all__ = [
    "LOWERINGS",
    "AttentionMask",
    "KVCache",
    "KeyRanges",
    "Llama",
    "attend",
    "from_arrays",
    "initial_weight",
    "input_squares",
    "largest_difference",
    "load",
    "read_weight",
    "state_arrays",
    "to_array",
    "to_tensor",
]
