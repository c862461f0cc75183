"""What `benchmarks/gpu.py` measures and how: rows, random networks, one row's steps, traces, the table."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # a machine without network has a checkout, not an installation
