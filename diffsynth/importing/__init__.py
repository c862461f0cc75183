"""Turns commands of DiffSynth-Studio into ours: `python -m diffsynth.importing FILE.sh`, or training_args.json.

Read `shell.py` (the grammar of scripts), `parsing.py` (their commands), `flags.py` (the table of their flags),
`models.py` (whose weights they are) and `ours.py` (our command, checked) in this order.
"""
