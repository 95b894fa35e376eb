"""Configuration of the report stage: the assumptions behind energy and carbon, and the words nobody can measure."""

from __future__ import annotations

from pydantic import Field

from herd.config import Config

WATTS_REASON = (
    "an assumption, not a measurement: server processors of 250 to 350 W with 32 to 64 cores draw 4 to 11 W per busy "
    "core, and memory and board come on top"
)
CARBON_REASON = (
    "the power usage effectiveness 1.1 and the 0.385 kg of CO2 per kWh that reproduce the figures in Meta's "
    "Llama 1 and Llama 2 model cards"
)


class ReportConfig(Config):
    """What the report and the model card say beyond what was measured."""

    licence: str = Field(
        default="Apache-2.0", min_length=1, max_length=200, description="licence of the trained weights"
    )
    data_licence: str | None = Field(
        default=None,
        min_length=1,
        max_length=400,
        description="licence of the training text; null: PSF-2.0 for python-stdlib alone, else that of its sources",
    )
    watts_per_core: float = Field(default=10.0, gt=0, le=2000, description=f"power of one busy core; {WATTS_REASON}")
    pue: float = Field(default=1.1, ge=1, le=3, description="power usage effectiveness of the place it ran at")
    carbon_kg_per_kwh: float = Field(default=0.385, ge=0, le=2, description="carbon intensity of the electricity")
    samples: int = Field(default=6, ge=0, le=50, description="sample completions shown")
    exercises: int = Field(default=12, ge=0, le=200, description="answered exercises shown")
    limitations: tuple[str, ...] = Field(
        default=(), description="further limitations for the model card, one sentence each"
    )
