"""The order of samples as a function of their position in a run: buckets, weighted mixtures, batches."""
