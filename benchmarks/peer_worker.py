"""One measurement of a peer of native_vs_peers.py, which starts this with the peer's Python: a process each.

    python peer_worker.py FACTS    FACTS: JSON with the arguments of `work`; the result is printed as JSON

Needs nothing of Herd. For openvino: openvino-genai, and to convert a model optimum-intel with nncf; for hf: torch and
transformers. Prompts are new random tokens every time, so that no cache of prefixes can answer; every token's successor
is chosen greedily; only the last token of a prompt gets logits.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_UP = 4
"""Tokens to generate first; compiled models are compiled again for the first two."""

Speeds = tuple[float, float]
"""Seconds to the first token, and for all others together."""


def work(kind: str, peer: str, model: str, setting: dict[str, Any], **sizes: int) -> float | None:
    """Convert a model ("convert": `model` to `setting["to"]`) or measure.

    "load": seconds, without importing packages. "prefill" and "decode": tokens per second. "once": nothing, as the
    parent measures.
    """
    if kind == "convert":
        convert(model, **setting)
        return None
    threads, prompt, depth, steps = (sizes[name] for name in ("threads", "prompt", "depth", "steps"))
    load = {"openvino": load_openvino, "hf": load_hf}[peer](Path(model), threads, **setting)
    start = time.perf_counter()
    generate = load(prompt + depth + steps + 1)
    if kind == "load":
        return time.perf_counter() - start
    if kind == "once":
        generate(prompt, 0)
        return None
    if kind == "prefill":
        generate(prompt, 0)
        return prompt / generate(prompt, 0)[0]
    generate(max(depth, 1), WARM_UP)
    return steps / generate(max(depth, 1), steps)[1]


def convert(model: str, to: str, bits: int, group: int) -> None:
    """Compress a model in Hugging Face's form: symmetric weights of 4 bits in groups, or of 8 bits by channels."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    grouped = {"group_size": group, "ratio": 1.0, "group_size_fallback": "adjust"} if bits == 4 else {}
    config = OVWeightQuantizationConfig(bits=bits, sym=True, **grouped)
    made = OVModelForCausalLM.from_pretrained(model, export=True, quantization_config=config, compile=False)
    half = Path(f"{to}.part")
    made.save_pretrained(half)
    half.rename(to)


def load_openvino(model: Path, threads: int, **properties: Any) -> Callable[[int], Callable[[int, int], Speeds]]:
    """A pipeline of OpenVINO GenAI; no files of a tokenizer are needed for token ids."""
    import numpy as np
    import openvino
    import openvino_genai

    size = json.loads((model / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng()

    def load(context: int) -> Callable[[int, int], Speeds]:
        pipeline = openvino_genai.LLMPipeline(str(model), "CPU", INFERENCE_NUM_THREADS=threads, **properties)

        def generate(prompt: int, steps: int) -> Speeds:
            ids = openvino.Tensor(rng.integers(size, size=(1, prompt), dtype=np.int64))
            wanted = openvino_genai.GenerationConfig(max_new_tokens=steps + 1, ignore_eos=True, do_sample=False)
            found = pipeline.generate(ids, wanted)
            assert len(found.tokens[0]) == steps + 1
            first = found.perf_metrics.get_ttft().mean / 1000
            return first, found.perf_metrics.get_generate_duration().mean / 1000 - first

        return generate

    return load


def load_hf(
    model: Path, threads: int, compiled: bool, static: bool, inductor: dict[str, Any]
) -> Callable[[int], Callable[[int, int], Speeds]]:
    """transformers in bfloat16 with torch's attention; `static`: a cache of fixed size; `inductor`: its settings."""
    import torch
    from transformers import DynamicCache, LlamaForCausalLM, StaticCache
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    if compiled:
        import torch._inductor.config

        for name, value in inductor.items():
            setattr(torch._inductor.config, name, value)

    def load(context: int) -> Callable[[int, int], Speeds]:
        llama = LlamaForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        step = torch.compile(llama, dynamic=False, fullgraph=True) if compiled else llama

        @torch.no_grad()  # inference mode would keep torch.compile from freezing weights
        def generate(prompt: int, steps: int) -> Speeds:
            kind = {"max_cache_len": context} if static else {}
            cache = (StaticCache if static else DynamicCache)(config=llama.config, **kind)
            ids = torch.tensor([random.choices(range(llama.config.vocab_size), k=prompt)])
            start, first, end = time.perf_counter(), 0.0, 0.0
            for index in range(steps + 1):
                past = index and prompt + index - 1
                places = torch.arange(past, past + ids.shape[1])[None]
                found = step(ids, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids = found.logits[:, -1].argmax(-1, keepdim=True)
                end = time.perf_counter()
                first = first or end - start
            return first, end - start - first

        return generate

    return load


if __name__ == "__main__":
    result = work(**json.loads(sys.argv[1]))
    print(json.dumps(result))
