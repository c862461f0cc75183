"""One training run: `run` is its configuration, `loop` trains, `state` is what a step changes and a checkpoint saves.

`engines` spread a run over processes, `validation` evaluates it, and `record` writes its metrics and its data report.
"""
