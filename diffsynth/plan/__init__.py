"""What a run will take, before it runs: every stage rehearsed on tensors without values."""
