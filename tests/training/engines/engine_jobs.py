"""Run train.py several times in the ranks of a group, each time under the engine that the job names.

A job is `{engine, overrides}`. With `cut_off` it says after which step its power is cut, with `poisoned` in which step
its losses are NaN, with `split` that processes share the tokens of a sample.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import tiny
from deepspeed.runtime.activation_checkpointing import checkpointing

from diffsynth.config import claim, finish

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
TOKENS_SPLIT = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}
ENGINES = {  # what `accelerate launch` makes of the files in conf/accelerate
    "ddp": {},
    **{
        name: {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": f"{tiny.ROOT}/conf/accelerate/{name}.json",
        }
        for name in ("zero2", "zero2_offload", "zero3_offload")
    },
    "fsdp2": FSDP2,
    "context_parallel": FSDP2 | TOKENS_SPLIT,
}


def do(jobs: list[dict]) -> None:
    for job in jobs:
        run(**job)


def run(
    engine: str, overrides: list[str], cut_off: int | None = None, poisoned: int | None = None, split: bool = False
) -> None:
    cfg = tiny.compose("train", *overrides)
    checkpointing.deepspeed_checkpointing_enabled = False  # for good once configured: runs have processes of their own
    environment = ENGINES[engine] | (TOKENS_SPLIT if split else {})
    with mock.patch.dict(os.environ, environment), poison(poisoned), power(cut_off):
        claim(cfg)
        finish(cfg, tiny.call("train", cfg))


@contextmanager
def power(cut_off: int | None) -> Iterator[None]:
    """Inside, training ends by a power cut in the middle of the step after `cut_off`; None cuts nothing."""

    def cut():
        raise tiny.PowerCut

    try:
        with tiny.in_step(cut_off + 1, cut) if cut_off else nullcontext():
            yield
    except tiny.PowerCut:
        return


@contextmanager
def poison(step: int | None) -> Iterator[None]:
    """Inside, the losses of one step, counted from 1, are NaN."""
    from diffsynth.training.state import TrainingState

    backward = TrainingState.backward

    def poisoned(state, losses):
        backward(state, losses * float("nan") if state.step + 1 == step else losses)

    with mock.patch.object(TrainingState, "backward", poisoned):
        yield
