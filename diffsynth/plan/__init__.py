"""What a run will take, before it runs: every stage rehearsed on tensors without values."""

from .budget import Budget
from .plan import Plan, Planner, Stage
from .preflight import preflight
from .run import Run
from .show import chart, table
from .sketch import needs_download

__all__ = ["Budget", "Plan", "Planner", "Run", "Stage", "chart", "needs_download", "preflight", "table"]
