"""Stage one of two-stage training: the outputs of frozen units for a data set, cached on disk under content keys.

`keys` computes the keys, `make` makes a cache, `verify` checks one; `core.data.cache` is the file format.
"""
