"""architecture: what a Llama is, as data. Needs nothing but the standard library."""

from herd.architecture.config import (
    AttentionTemperature,
    Generation,
    LlamaConfig,
    MoeConfig,
    RopeScaling,
    ffn_width,
)
from herd.architecture.frequencies import attention_scale, law_theta, ntk_theta, rope_frequencies
from herd.architecture.releases import Release, releases
from herd.architecture.size import (
    active_parameter_count,
    kv_cache_bytes,
    multiplying_parameter_count,
    parameter_count,
    training_flops_per_token,
    weight_bytes,
)
from herd.architecture.stretch import StretchMethod, stretched
from herd.architecture.tensors import IGNORED, Rule, shard_axis, stored_tensors, tensor_shapes

__all__ = [
    "IGNORED",
    "AttentionTemperature",
    "Generation",
    "LlamaConfig",
    "MoeConfig",
    "Release",
    "RopeScaling",
    "Rule",
    "StretchMethod",
    "active_parameter_count",
    "attention_scale",
    "ffn_width",
    "kv_cache_bytes",
    "law_theta",
    "multiplying_parameter_count",
    "ntk_theta",
    "parameter_count",
    "releases",
    "rope_frequencies",
    "shard_axis",
    "stored_tensors",
    "stretched",
    "tensor_shapes",
    "training_flops_per_token",
    "weight_bytes",
]
