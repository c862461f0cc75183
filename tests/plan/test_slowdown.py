"""The order in which a budget tries its options rests on operations that are counted, not guessed."""

from dataclasses import replace

import pytest
import tiny

from diffsynth.plan.meta_module import MetaModules
from diffsynth.plan.options import DEVICE_FLOPS, Options
from diffsynth.plan.run import PlacedRun
from diffsynth.training.checks import scan

# Operations of a forward pass of one image of 1024 x 1024, by torch's FlopCounterMode on the released networks.
FORWARD = {"flux2_klein_4b": (512, 35.2e12), "flux2_klein_9b": (512, 76.1e12), "qwen_image": (256, 73.8e12)}


def options(tmp_path, model: str) -> Options:
    tokens = FORWARD[model][0]
    size = ["dataset.height=1024", "dataset.width=1024", f"tokens={tokens}", "batch_size=1", "cached=true"]
    cfg = tiny.compose("plan", f"model={model}", *size, "cache_batch_size=1", f"output_root={tmp_path}")
    run = PlacedRun(**tiny.build(cfg), on_cuda=True)
    scan(run.dataset, run.media, run.task, None)
    return Options(run, MetaModules(run))


@pytest.mark.parametrize("model", tiny.mostly_slow(FORWARD, "flux2_klein_4b"))
def test_a_forward_pass_has_the_operations_that_torch_counts(model, tmp_path):
    forward, backward = (seconds * DEVICE_FLOPS for seconds in options(tmp_path, model).seconds)
    assert forward == pytest.approx(FORWARD[model][1], rel=0.05)
    assert 1.1 < backward / forward < 1.3  # an adapter's: there are no gradients of frozen weights


@pytest.mark.slow
def test_8_bits_are_tried_before_two_thirds_of_the_blocks_are_streamed(tmp_path):
    tried = options(tmp_path, "qwen_image")
    blocks = replace(tried.run.memory, checkpointing="blocks")
    stored, streamed = replace(blocks, storage="int8"), replace(blocks, stream_blocks=42)
    assert tried.slowdown(stored, 1) < 2 < tried.slowdown(streamed, 1)
