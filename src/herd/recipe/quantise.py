"""The quantise stage: the final model as GGUF files, what each format costs in bits per byte, and how fast it is."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from herd.architecture import parameter_count
from herd.checkpoint import open_checkpoint, save
from herd.config import Config
from herd.engine import LLM
from herd.evaluate import bits_per_byte, first_documents
from herd.files import write_json

Format = Literal[
    "f32", "bf16", "f16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "iq4_xs",
    "q2_k", "q3_k", "q3_k_m", "q4_k", "q4_k_s", "q4_k_m", "q5_k", "q5_k_m", "q6_k", "int4_g32", "int4_g128",
]  # fmt: skip


_TIMED_TOKENS, _TIMED_ANSWERS = 64, 5


class QuantiseConfig(Config):
    """Which files to write, and on how much text to score them."""

    formats: tuple[Format, ...] = Field(
        default=("q8_0", "q4_0"), min_length=1, description="number formats or mixes, one file each"
    )
    heldout_bytes: int = Field(
        default=200_000, ge=1000, description="held-out text to score each file on: whole documents up to about this"
    )


def quantise(config: QuantiseConfig, checkpoint: Path, heldout: list[str], out: Path, *, name: str) -> dict[str, Any]:
    """Write model-<format>.gguf for every format and results.json, whose data is returned.

    Every file is loaded back, scored and timed, and the source on the same text; where nothing was held out,
    bits_per_byte is None. `name` is the model's name in the files.
    """
    documents = first_documents(heldout, config.heldout_bytes)
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    with open_checkpoint(checkpoint) as model:
        parameters = parameter_count(model.config)
        formats = {"source": _entry(checkpoint, weights, parameters, documents)}
        for dtype in dict.fromkeys(config.formats):
            file = out / f"model-{dtype}.gguf"
            metadata = {"name": name}
            save(file, model.config, model, format="gguf", dtype=dtype, tokenizer=model.tokenizer, metadata=metadata)
            formats[dtype] = _entry(file, file.stat().st_size, parameters, documents)
    results = {
        "source": "source",
        "documents": len(documents),
        "bytes": sum(len(text.encode()) for text in documents),
        "parameters": parameters,
        "formats": formats,
    }
    write_json(out / "results.json", results)
    return results


def _entry(path: Path, size: int, parameters: int, documents: list[str]) -> dict[str, Any]:
    with LLM(path) as llm:
        return {
            "file": path.name,
            "bytes": size,
            "bits_per_weight": 8 * size / parameters,
            "bits_per_byte": bits_per_byte(llm, documents).bits_per_byte if documents else None,
            "tokens_per_s": _decode_speed(llm),
        }


def _decode_speed(llm: LLM) -> float:
    """Tokens generated per second for one request: the middle of a few short answers."""
    length = min(_TIMED_TOKENS, llm.context - 1)
    answers = [
        llm.generate([0], max_tokens=length, temperature=0, ignore_eos=True).timings.decode_tokens_per_s
        for _ in range(_TIMED_ANSWERS)
    ]
    return statistics.median(answers)
