"""Which parallel layout fits a training run, what memory it takes and how long a step lasts: arithmetic, no torch.

>>> job = Job(releases["llama3.1-405b"].config, seq=8192, batch_tokens=2**24, trainer="published")
>>> make_plan(job, 8192, 80 * 2**30, gpu_named("h100")).plan.layout
Layout(tp=8, cp=1, pp=16, dp=64, ep=1)
"""

from herd.train.plan.hardware import GPUS, Gpu, gpu_named
from herd.train.plan.layout import Job, Layout, Settings, problems
from herd.train.plan.memory import Memory
from herd.train.plan.search import Choice, Plan, make_plan
from herd.train.plan.step_time import StepTime

__all__ = [
    "GPUS",
    "Choice",
    "Gpu",
    "Job",
    "Layout",
    "Memory",
    "Plan",
    "Settings",
    "StepTime",
    "gpu_named",
    "make_plan",
    "problems",
]
