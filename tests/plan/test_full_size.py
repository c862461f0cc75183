"""The 20-billion-parameter model takes the same code path: one LoRA step through all 60 blocks, on the meta device."""

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from diffsynth.core.data import SampleAddress
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.distillation.discriminator import Discriminator
from diffsynth.diffusion.loss import DMD2, FlowMatchSFT, TrainProgress
from diffsynth.diffusion.randomness import SampleRNG
from diffsynth.diffusion.training_module import prepare_training
from diffsynth.pipelines.qwen_image import QwenImagePipeline

TARGETS = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"]


@pytest.fixture(scope="module")
def pipe_and_losses():
    pipe = QwenImagePipeline(device="meta", torch_dtype=torch.bfloat16)
    with torch.device("meta"):
        pipe.dit = QwenImageTransformer2DModel().to(torch.bfloat16)
        prepare_training(pipe, [], LoRA(rank=32, target_modules=TARGETS), seed=0)
        inputs = {
            "input_latents": torch.empty(2, 16, 166, 166, dtype=torch.bfloat16),
            "prompt_emb": torch.empty(2, 60, 3584, dtype=torch.bfloat16),
            "prompt_emb_mask": torch.empty(2, 60, dtype=torch.bool),
        }
    rng = SampleRNG(0, [SampleAddress(0, 0), SampleAddress(0, 1)])
    losses = FlowMatchSFT()(pipe, rng=rng, use_gradient_checkpointing=True, **inputs)
    losses.mean().backward()
    return pipe, losses


@pytest.mark.slow
def test_a_batch_of_two_at_1328_pixels_has_two_losses(pipe_and_losses):
    assert pipe_and_losses[1].shape == (2,)


@pytest.mark.slow
def test_frozen_weights_are_bf16_and_the_adapter_fp32_with_gradients(pipe_and_losses):
    dit = pipe_and_losses[0].dit
    trained = {name: p for name, p in dit.named_parameters() if p.requires_grad}
    frozen = [p for p in dit.parameters() if not p.requires_grad]
    assert sum(p.numel() for p in frozen) > 20e9
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    without = {name.split(".lora_")[0] for name, p in trained.items() if p.grad is None}
    assert without == {"transformer_blocks.59.attn.to_add_out"}  # the last block's text goes nowhere


@pytest.mark.parametrize("progress", [TrainProgress(0, 10), TrainProgress(1, 10)], ids=["student", "fake score"])
def test_roles_of_the_real_width_share_one_base(progress):
    pipe, lora = QwenImagePipeline(device="meta", torch_dtype=torch.bfloat16), LoRA(rank=32, target_modules=TARGETS)
    task = DMD2(discriminator=Discriminator(layers=["transformer_blocks.0"]))
    with torch.device("meta"):
        pipe.dit = QwenImageTransformer2DModel(num_layers=2).to(torch.bfloat16)
        prepare_training(pipe, [], lora, seed=0)
        roles = task.build_roles(pipe, lora, seed=0)
        text = {"prompt_emb": torch.empty(1, 60, 3584), "prompt_emb_mask": torch.empty(1, 60, dtype=torch.bool)}
        inputs = {"input_latents": torch.empty(1, 16, 166, 166), "height": 1328, "width": 1328, **text}
    sides = {"roles": roles, "negative": text, "progress": progress, "use_gradient_checkpointing": True}
    task(pipe, rng=SampleRNG(0, [SampleAddress(0, 0)]), **inputs, **sides).mean().backward()
    adapters = {name: p for name, p in pipe.dit.named_parameters() if p.requires_grad}
    role = "default" if progress.step == 0 else "fake_score"
    reached = {name for name, p in adapters.items() if p.grad is not None}
    assert reached and all(f".{role}." in name for name in reached)
    assert [p.dtype for p in adapters.values()] == [torch.float32] * len(adapters)
    assert list(roles.networks) == ["discriminator"]
