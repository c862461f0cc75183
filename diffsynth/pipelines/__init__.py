"""One file a model family: its units, its `model_fn`, nothing else."""
