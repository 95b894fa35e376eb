"""Every released Llama text model by name, with the shape that its published parameter count follows from.

Numbers: the model cards, the papers and Meta's registry, as cross-checked in the project's fact sheet. Two known
traps: the registry's Llama 2 7B and 13B rows are wrong (they are plain multi-head with theta 1e4), and Llama 3.2's
small models use RoPE factor 32 in their Hugging Face configs where Meta's code hard-codes 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from herd.architecture.config import (
    AttentionTemperature,
    Generation,
    LlamaConfig,
    MoeConfig,
    RopeScaling,
    ffn_width,
)


@dataclass(frozen=True)
class Release:
    """One published model. `parameters` is the published integer, not one computed from `config`."""

    name: str
    config: LlamaConfig
    parameters: int
    licence: str
    released: bool = True
    note: str = ""


_LLAMA1 = "LLaMA non-commercial"
_LLAMA2 = "Llama 2 Community"
_LLAMA3 = "Llama 3 Community"
_LLAMA31 = "Llama 3.1 Community"
_LLAMA32 = "Llama 3.2 Community"
_LLAMA33 = "Llama 3.3 Community"
_LLAMA4 = "Llama 4 Community"


def _dense(
    generation: Generation,
    dim: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    multiplier: float | None = None,
    multiple_of: int = 256,
    vocab: int,
    theta: float,
    context: int,
    eps: float = 1e-5,
    tied: bool = False,
    scaling: RopeScaling | None = None,
) -> LlamaConfig:
    return LlamaConfig(
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=dim // heads,
        ffn_dim=ffn_width(dim, multiplier, multiple_of),
        vocab_size=vocab,
        norm_eps=eps,
        rope_theta=theta,
        rope_scaling=scaling,
        context_length=context,
        tied_embeddings=tied,
        generation=generation,
    )


def _llama1() -> Iterator[Release]:
    rows = (
        ("7b", 4096, 32, 32, 1e-6, 6_738_415_616),
        ("13b", 5120, 40, 40, 1e-6, 13_015_864_320),
        ("33b", 6656, 60, 52, 1e-6, 32_528_943_616),
        ("65b", 8192, 80, 64, 1e-5, 65_285_660_672),
    )
    for size, dim, layers, heads, eps, parameters in rows:
        config = _dense("llama1", dim, layers, heads, heads, vocab=32_000, theta=1e4, context=2048, eps=eps)
        yield Release(f"llama1-{size}", config, parameters, _LLAMA1)


def _llama2() -> Iterator[Release]:
    def shape(dim: int, layers: int, heads: int, kv: int, multiplier: float | None, multiple_of: int) -> LlamaConfig:
        return _dense(
            "llama2", dim, layers, heads, kv,
            multiplier=multiplier, multiple_of=multiple_of, vocab=32_000, theta=1e4, context=4096,
        )  # fmt: skip

    rows = (
        ("7b", shape(4096, 32, 32, 32, None, 256), 6_738_415_616, True),
        ("13b", shape(5120, 40, 40, 40, None, 256), 13_015_864_320, True),
        ("34b", shape(8192, 48, 64, 8, 1.0, 256), 33_743_970_304, False),
        ("70b", shape(8192, 80, 64, 8, 1.3, 4096), 68_976_648_192, True),
    )
    for size, config, parameters, released in rows:
        note = "" if released else "described in the paper, never released"
        yield Release(f"llama2-{size}", config, parameters, _LLAMA2, released, note)
        yield Release(f"llama2-{size}-chat", config, parameters, _LLAMA2, released, note)


def _codellama() -> Iterator[Release]:
    def shape(dim: int, layers: int, heads: int, kv: int, multiplier: float | None, multiple_of: int) -> LlamaConfig:
        return _dense(
            "codellama", dim, layers, heads, kv,
            multiplier=multiplier, multiple_of=multiple_of, vocab=32_016, theta=1e6, context=16_384,
        )  # fmt: skip

    small, middle = shape(4096, 32, 32, 32, None, 256), shape(5120, 40, 40, 40, None, 256)
    large = replace(shape(8192, 48, 64, 8, 1.0, 256), vocab_size=32_000)
    largest = shape(8192, 80, 64, 8, 1.3, 4096)
    short = replace(largest, rope_theta=1e4, context_length=4096)
    plain = "no infilling tokens, hence the smaller vocabulary"
    unsure = "theta and context of this variant are not confirmed by a primary source"
    for name, config, parameters, note in (
        ("7b", small, 6_738_546_688, ""),
        ("7b-instruct", small, 6_738_546_688, ""),
        ("7b-python", replace(small, vocab_size=32_000), 6_738_415_616, plain),
        ("13b", middle, 13_016_028_160, ""),
        ("13b-instruct", middle, 13_016_028_160, ""),
        ("13b-python", replace(middle, vocab_size=32_000), 13_015_864_320, plain),
        ("34b", large, 33_743_970_304, ""),
        ("34b-instruct", large, 33_743_970_304, ""),
        ("34b-python", large, 33_743_970_304, ""),
        ("70b", largest, 68_976_910_336, ""),
        ("70b-instruct", short, 68_976_910_336, unsure),
        ("70b-python", short, 68_976_910_336, unsure),
    ):
        yield Release(f"codellama-{name}", config, parameters, _LLAMA2, True, note)


_SCALED_8 = RopeScaling("llama3", factor=8.0)
_SCALED_32 = RopeScaling("llama3", factor=32.0)
_8B = _dense("llama3", 4096, 32, 32, 8, multiplier=1.3, multiple_of=1024, vocab=128_256, theta=5e5, context=8192)
_70B = _dense("llama3", 8192, 80, 64, 8, multiplier=1.3, multiple_of=4096, vocab=128_256, theta=5e5, context=8192)
_405B = _dense(
    "llama3.1", 16_384, 126, 128, 8,
    multiplier=1.2, multiple_of=4096, vocab=128_256, theta=5e5, context=131_072, scaling=_SCALED_8,
)  # fmt: skip
_1B = _dense(
    "llama3.2", 2048, 16, 32, 8,
    multiplier=1.5, multiple_of=256, vocab=128_256, theta=5e5, context=131_072, scaling=_SCALED_32, tied=True,
)  # fmt: skip
_3B = _dense(
    "llama3.2", 3072, 28, 24, 8,
    multiplier=1.0, multiple_of=256, vocab=128_256, theta=5e5, context=131_072, scaling=_SCALED_32, tied=True,
)  # fmt: skip


def _llama3() -> Iterator[Release]:
    def extended(config: LlamaConfig, generation: Generation) -> LlamaConfig:
        return replace(config, generation=generation, context_length=131_072, rope_scaling=_SCALED_8)

    rows = (
        ("llama3-8b", _8B, 8_030_261_248, _LLAMA3),
        ("llama3-70b", _70B, 70_553_706_496, _LLAMA3),
        ("llama3.1-8b", extended(_8B, "llama3.1"), 8_030_261_248, _LLAMA31),
        ("llama3.1-70b", extended(_70B, "llama3.1"), 70_553_706_496, _LLAMA31),
        ("llama3.1-405b", _405B, 405_853_388_800, _LLAMA31),
        ("llama3.2-1b", _1B, 1_235_814_400, _LLAMA32),
        ("llama3.2-3b", _3B, 3_212_749_824, _LLAMA32),
    )
    for name, config, parameters, licence in rows:
        yield Release(name, config, parameters, licence)
        yield Release(f"{name}-instruct", config, parameters, licence)
    yield Release("llama3.3-70b-instruct", extended(_70B, "llama3.3"), 70_553_706_496, _LLAMA33)


def _llama4() -> Iterator[Release]:
    common = LlamaConfig(
        dim=5120,
        n_layers=48,
        n_heads=40,
        n_kv_heads=8,
        head_dim=128,
        ffn_dim=16_384,
        vocab_size=202_048,
        context_length=262_144,
        moe=MoeConfig(n_experts=16, ffn_dim=8192),
        nope_interval=4,
        attention_chunk=8192,
        qk_norm=True,
        attention_temperature=AttentionTemperature(),
        rope_scaling=RopeScaling("llama3", factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0),
        generation="llama4",
    )
    maverick = replace(
        common, moe=MoeConfig(n_experts=128, ffn_dim=8192, interleave=2), qk_norm=False, rope_scaling=None
    )
    note = "text model; the vision encoder adds about 0.87 billion"
    for name, config, instruct_context, parameters in (
        ("llama4-scout-17b-16e", common, 10_485_760, 107_769_861_120),
        ("llama4-maverick-17b-128e", maverick, 1_048_576, 400_711_848_960),
    ):
        yield Release(name, config, parameters, _LLAMA4, True, note)
        instruct = replace(config, context_length=instruct_context)
        yield Release(f"{name}-instruct", instruct, parameters, _LLAMA4, True, note)


releases: dict[str, Release] = {
    release.name: release for generation in (_llama1, _llama2, _codellama, _llama3, _llama4) for release in generation()
}
