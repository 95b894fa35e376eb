"""Needle in a haystack: does a model find a number in a long text, wherever it lies?

from herd import LLM
from herd.evaluate import needle
config = needle.NeedleConfig(lengths=(256, 512), depths=needle.even_depths(5), samples=4)
with LLM("runs/pocket") as llm:
    results = needle.run(config, llm, "needle")
needle.write_page(results, "needle/needle.html")
"""

from herd.evaluate.needle.config import PRESETS, NeedleConfig, even_depths
from herd.evaluate.needle.grid import run
from herd.evaluate.needle.picture import write_page, write_png
from herd.evaluate.needle.prompts import Haystack, NeedlePrompt, PromptMaker, read_haystack

__all__ = [
    "PRESETS",
    "Haystack",
    "NeedleConfig",
    "NeedlePrompt",
    "PromptMaker",
    "even_depths",
    "read_haystack",
    "run",
    "write_page",
    "write_png",
]
