"""Readers of rows: metadata tables, captions beside images, tar shards, Hugging Face data sets, example images."""
