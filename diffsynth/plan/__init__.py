"""What a run will take, before it runs: every stage rehearsed on tensors without values."""

from .budget import Budget
from .plan import Plan, Run, Stage
from .preflight import preflight
from .show import chart, table

__all__ = ["Budget", "Plan", "Run", "Stage", "chart", "preflight", "table"]
