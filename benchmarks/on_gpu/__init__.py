"""What `benchmarks/gpu.py` measures and how: rows, random networks, one row's steps, traces, the table."""
