"""Rows: from tables, captions beside images, tar shards, data sets on disk, prompts."""
