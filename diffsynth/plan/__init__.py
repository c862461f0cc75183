"""What a run will take, before it runs: every stage rehearsed on tensors without values."""

from ..training.run import Run
from .budget import Budget
from .meta_pipeline import needs_download
from .plan import Plan, Planner, Stage
from .preflight import preflight
from .show import chart, table

__all__ = ["Budget", "Plan", "Planner", "Run", "Stage", "chart", "needs_download", "preflight", "table"]
