"""What a run will take, before it runs: every stage rehearsed on tensors without values."""

from .plan import Plan, Run, Stage
from .preflight import preflight
from .show import chart, table

__all__ = ["Plan", "Run", "Stage", "chart", "preflight", "table"]
