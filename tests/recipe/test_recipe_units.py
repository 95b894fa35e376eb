"""Quantities in words, and the arithmetic of FLOPs, energy and carbon against published figures."""

from __future__ import annotations

import pytest

from herd.architecture import releases
from herd.recipe.compute import Energy, training_compute
from herd.recipe.measure import Meter, host
from herd.recipe.units import count, duration, scientific, size


def test_quantities_in_words() -> None:
    assert [duration(s) for s in (0, 0.44, 9.94, 9.96, 59.4, 59.6, 245, 3599.6, 3600, 7380)] == [
        "0.0 s", "0.4 s", "9.9 s", "10 s", "59 s", "1 min 00 s", "4 min 05 s", "1 h 00 min", "1 h 00 min", "2 h 03 min",
    ]  # fmt: skip
    assert [size(n) for n in (0, 999, 1000, 9_600_000, 123_456_789, 4e9)] == [
        "0 B", "999 B", "1.00 kB", "9.60 MB", "123 MB", "4.00 GB",
    ]  # fmt: skip
    assert [count(n) for n in (0, 950, 12_345, 4_999_424, 8_030_261_248, 1.5e13)] == [
        "0", "950", "12.3k", "5.00M", "8.03B", "15.0T",
    ]  # fmt: skip
    assert scientific(0) == "0" and scientific(2.3456e-7) == "2.35 × 10⁻⁷" and scientific(1.98e14, 1) == "2.0 × 10¹⁴"


@pytest.mark.parametrize(
    ("hours", "watts", "tonnes"),
    [(82_432, 400, 14), (135_168, 400, 23), (530_432, 400, 90), (1_022_362, 400, 173), (184_320, 400, 31.22),
     (368_640, 400, 62.44), (1_038_336, 350, 153.90), (1_720_320, 400, 291.42)],
)  # fmt: skip
def test_carbon_of_llama_1_and_2_as_published(hours: float, watts: float, tonnes: float) -> None:
    energy = Energy(hours, watts, pue=1.1, kg_per_kwh=0.385)
    assert energy.tonnes_co2 == pytest.approx(tonnes, abs=0.5 if tonnes == int(tonnes) else 0.01)
    assert energy.kwh == pytest.approx(hours * watts * 1.1 / 1000)


def test_flops_of_llama_3_405b_as_published() -> None:
    """The Llama 3 paper gives 3.8e25 FLOPs for 15.6T tokens (§3.2); most of them in rows of 8,192."""
    compute = training_compute(releases["llama3.1-405b"].config, 15_600_000_000_000, 15_600_000_000_000, 8192)
    assert compute.flops == pytest.approx(3.8e25, rel=0.06)
    assert compute.weights == 405_853_388_800 - 128_256 * 16_384
    assert compute.weight_flops == pytest.approx(6 * compute.weights * compute.tokens)
    assert compute.attention_flops == pytest.approx(6 * 126 * 128 * 128 * 8192 * compute.tokens)
    assert compute.pflop_days == pytest.approx(compute.flops / (1e15 * 86400))


def test_the_output_matrix_counts_for_supervised_tokens_only() -> None:
    config = releases["llama3-8b"].config
    whole, part = training_compute(config, 1000, 1000, 8192), training_compute(config, 1000, 200, 8192)
    assert whole.flops - part.flops == pytest.approx(6 * 128_256 * 4096 * 800)
    assert whole.attention_flops == pytest.approx(part.attention_flops)


def test_the_meter_sees_cpu_time_and_memory() -> None:
    meter = Meter()
    block = bytearray(80_000_000)
    block[::4096] = b"x" * len(block[::4096])
    total = sum(i * i for i in range(400_000))
    usage = meter.read()
    assert total > 0 and 0 < usage.cpu_seconds <= usage.wall_seconds * host()["cores"] + 0.1
    assert usage.peak_memory_bytes >= len(block)
