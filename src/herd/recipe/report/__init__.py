"""From a run's stage directories to people: report.html, MODEL_CARD.md and loss.png. Needs no PyTorch."""

from __future__ import annotations

from herd.recipe.report.build import rebuild_report, write_report
from herd.recipe.report.config import ReportConfig
from herd.recipe.report.data import RunData, read_metrics

__all__ = ["ReportConfig", "RunData", "read_metrics", "rebuild_report", "write_report"]
