"""The plan of a training against the live tensors of one real step, on one block of each list at its released width."""

import pytest
import torch
from test_every_task import planner
from torch.utils._pytree import tree_map

from diffsynth.core.data import Row, Sample, SampleAddress
from diffsynth.core.live_bytes import LiveBytes
from diffsynth.diffusion.adapters.files import leave_casts_to_autocast
from diffsynth.diffusion.memory_layout import lay_out
from diffsynth.diffusion.pipeline.remembered import UnitMemory
from diffsynth.diffusion.randomness import SampleRNG
from diffsynth.diffusion.trained import TrainProgress
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.plan.few_blocks import block_lists
from diffsynth.plan.meta_module import copied
from diffsynth.plan.rehearsal import Rehearsal

SIDE = 256
VIDEOS = {"dataset.num_frames": 9, "model.num_frames": 9}
MODELS = {
    "anima": {},
    "chroma": {},
    "ernie_image": {},
    "flux1_dev": {},
    "flux2_klein_base_4b": {},
    "flux3_klein_base": {},
    "krea2": {},
    "qwen_image": {},
    "qwen_image_21": {},
    "sd3_5_medium": {},
    "wan21_t2v_1_3b": VIDEOS,
    "wan22_ti2v_5b": VIDEOS,
    "wan21_vace_1_3b": VIDEOS,
    "z_image": {},
}


def real(module: PipelineTrainingModule) -> PipelineTrainingModule:
    """A module of the meta device with random weights on the CPU."""
    module.pipe.device = torch.device("cpu")
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for buffer in module.buffers():
        buffer.zero_()
    lay_out(module)
    leave_casts_to_autocast(module)
    return module


def live_peak(module: PipelineTrainingModule, row: Row) -> int:
    """Bytes of live tensors at the peak of a forward and a backward pass, the weights included."""
    samples, rng = [Sample(row, 0, 0)], SampleRNG(0, [SampleAddress(0, 0)])
    with LiveBytes() as live:
        live.watch([*module.parameters(), *module.buffers()])
        with torch.autocast("cpu", torch.bfloat16):
            losses = module.loss(samples, rng, UnitMemory(0), TrainProgress(0, 1))
        losses.mean().backward()
    return live.device.peak


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
@pytest.mark.parametrize("model", MODELS)
def test_a_plan_is_within_five_per_cent_of_the_live_tensors_of_one_block(model, checkpointing, tmp_path):
    size = {"dataset.height": SIDE, "dataset.width": SIDE, "model.height": SIDE, "model.width": SIDE, **MODELS[model]}
    overrides = [f"{name}={value}" for name, value in size.items()]
    own = [f"model={model}", "cached=true", "validation=none", "batch_size=1", f"memory.checkpointing={checkpointing}"]
    plans = planner(tmp_path, *own, *overrides)
    whole, recipe = plans.meta_modules.of(plans.run), plans.run.memory
    row, counts = plans.meta_modules.row(plans.run, plans.run.sizes[0]), dict.fromkeys(block_lists(whole), 1)
    rehearsal = Rehearsal(copied(whole, recipe, counts))
    planned = rehearsal.at_rest + rehearsal.train([row], accumulates=False).peak
    made = tree_map(
        lambda value: torch.zeros(value.shape, dtype=value.dtype) if torch.is_tensor(value) else value, row.made
    )
    assert abs(planned / live_peak(real(copied(whole, recipe, counts)), Row(row, made)) - 1) < 0.05
