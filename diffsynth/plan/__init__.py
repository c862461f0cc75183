"""Plans the memory of a run before it runs, by rehearsing every stage on tensors that have shapes but no values.

`meta_pipeline` builds a pipeline without weights and `meta_module` a training module of it. `rehearsal` runs a stage on
it and counts bytes; `few_blocks` does so faster. `footprint` adds what training holds, `shares` spreads that over
devices, and `plan` puts all stages together. `options` and `budget` choose memory options that fit; `preflight` does so
at the start of a run.
"""
