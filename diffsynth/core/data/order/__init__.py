"""The order of samples as a function of their position: buckets, mixtures, batches."""
