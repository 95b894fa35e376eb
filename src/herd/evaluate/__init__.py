"""How good is a model? Bits per byte, exact match with intervals, comparisons.

from herd import LLM, evaluate
from herd.align import exercises
with LLM("runs/pocket") as llm:
    print(evaluate.bits_per_byte(llm, ["def f(x):\\n    return x\\n"]).bits_per_byte)
    print(evaluate.exact_match(llm, exercises.generate(seed=0, n=200, split="heldout")).overall)
"""

from herd.evaluate.bits import BitsPerByte, bits_per_byte, first_documents
from herd.evaluate.compression import Compressed, compressors
from herd.evaluate.evaluation import EvaluateConfig, run
from herd.evaluate.matching import Answered, ExactMatch, exact_match
from herd.evaluate.statistics import Paired, Proportion, ci95, paired, proportion, wilson
from herd.evaluate.table import results_table

__all__ = [
    "Answered",
    "BitsPerByte",
    "Compressed",
    "EvaluateConfig",
    "ExactMatch",
    "Paired",
    "Proportion",
    "bits_per_byte",
    "ci95",
    "compressors",
    "exact_match",
    "first_documents",
    "paired",
    "proportion",
    "results_table",
    "run",
    "wilson",
]
