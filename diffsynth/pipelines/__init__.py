"""Model families, one per file: noise levels, networks, `model_fn`, units, and the pipeline that declares them."""
