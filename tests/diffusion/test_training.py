import re

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file

from diffsynth.core.data import Sample, SampleAddress, generator
from diffsynth.core.gradient import gradient_checkpoint_forward
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.flow_match import FlowMatchScheduler
from diffsynth.diffusion.logger import ModelLogger
from diffsynth.diffusion.loss import AutoencoderLoss, FlowMatchSFT, FlowMatchSFTLoss
from diffsynth.diffusion.pipeline.units import run_units
from diffsynth.diffusion.randomness import SampleRNG
from diffsynth.diffusion.timesteps import UniformWeighting
from diffsynth.pipelines.qwen_image import pack_latents, qwen_image_sigmas, unpack_latents
from diffsynth.training.accelerator import make_accelerator
from diffsynth.training.loop import launch_training_task

SEED = 5
ADAPTER = LoRA(rank=2, target_modules=["to_q", "add_k_proj", "img_mlp.net.2", "txt_mod.1"])
EVERYTHING = FlowMatchSFT(trainable_models=["dit", "text_encoder"])
# What released networks carry and no loss of a picture reaches: the text that leaves the last block (its first
# modulation still shapes the keys and values), the vision tower, and a language head of its own where it is not tied.
UNREACHED = re.compile(
    r"dit\.transformer_blocks\.3\.(txt_mlp\..*|attn\.(to_add_out|add_q_proj)\..*|attn\.norm_added_q\..*)"
    r"|text_encoder\.(model\.visual|lm_head)\..*"
)


class Thousandths:
    """A SampleRNG whose uniform numbers reach every level of the training grid."""

    def uniform(self, purpose):
        return (torch.arange(1000) + 0.5) / 1000


def with_random_adapter(module):
    """B of a new adapter is zero, which would hide A's gradient."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return module


def gradients(module, *batches):
    """Mean loss over the samples of all batches, and its gradients by name."""
    module.zero_grad()
    losses = [module(batch) for batch in batches]
    loss = torch.cat(losses).mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(found, expected, atol=1e-5):
    torch.testing.assert_close(found[0], expected[0], atol=atol, rtol=1e-5)
    torch.testing.assert_close(found[1], expected[1], atol=atol, rtol=1e-3)


def train(module, rows, folder, steps=2, **options):
    accelerator = make_accelerator("cpu", "float32")
    logger = ModelLogger(folder)
    launch_training_task(accelerator, rows, module, logger, max_steps=steps, micro_batch_size=3, **options)
    return logger.saved


# The loss ------------------------------------------------------------------------------------------------------------


def loss_written_out(pipe, sample):
    """w(σ) · mean ‖v_θ((1 - σ) x₀ + σ ε, σ) - (ε - x₀)‖², nothing shared with the code but networks and addresses."""
    address = (sample.epoch, sample.index)
    noise = torch.randn((16, 6, 4), generator=generator(SEED, "noise", *address)).unsqueeze(0)
    level = int(torch.rand(1, generator=generator(SEED, "timestep", *address)) * 1000)
    grid = qwen_image_sigmas(1000)
    sigma = grid[level]
    bell = torch.exp(-2 * (grid - 0.5) ** 2)
    weight = 1000 * (bell[level] - bell.min()) / (bell - bell.min()).sum()

    pixels = torch.tensor(np.array(sample.data["image"])).permute(2, 0, 1)[None] / 127.5 - 1
    clean = pipe.vae.encode(pixels)
    tokens = pipe.tokenize(sample.data["prompt"])
    text = pipe.text_encoder(**tokens, output_hidden_states=True).hidden_states[-1][:, 34:]
    noised = (1 - sigma) * clean + sigma * noise
    velocity = pipe.dit(pack_latents(noised), text, None, sigma[None], [[(1, 3, 2)]]).sample
    return weight * (unpack_latents(velocity, 6, 4) - (noise - clean)).pow(2).mean()


def test_loss_is_its_formula(training_module, samples):
    module = training_module(seed=SEED)
    with torch.no_grad():
        expected = torch.stack([loss_written_out(module.pipe, sample) for sample in samples])
        found = torch.cat([module([sample]) for sample in samples])
    assert expected.unique().numel() == 3 and expected.min() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_noise_and_level_follow_from_the_address(training_module, rows):
    module = training_module()
    with torch.no_grad():
        losses = [module([Sample(rows[1], *address)]).item() for address in ((0, 1), (0, 1), (0, 2), (1, 1))]
        other_seed = module.loss([Sample(rows[1], 0, 1)], SampleRNG(1, [SampleAddress(0, 1)])).item()
    assert losses[0] == losses[1]
    assert len({*losses, other_seed}) == 4


def test_the_task_chooses_what_a_level_counts(training_module, samples):
    weighted, uniform = training_module(), training_module(FlowMatchSFT(weighting=UniformWeighting()))
    rng = SampleRNG(0, [SampleAddress(sample.epoch, sample.index) for sample in samples])
    timesteps, _ = weighted.task.sample_timesteps(weighted.pipe.scheduler, rng)
    with torch.no_grad():
        ratio = weighted(samples) / uniform(samples)
    torch.testing.assert_close(ratio, weighted.pipe.scheduler.training_weight(timesteps))


def test_exact_upstream_reaches_376_levels_and_fp32_all():
    scheduler = FlowMatchScheduler(qwen_image_sigmas)
    scheduler.set_timesteps(1000, training=True)
    for exact, levels in ((True, 376), (False, 1000)):
        timesteps, sigmas = FlowMatchSFT(exact_upstream=exact).sample_timesteps(scheduler, Thousandths())
        assert len(sigmas.unique()) == levels
        assert torch.isin(sigmas, scheduler.sigmas).all()
        torch.testing.assert_close(timesteps, sigmas * 1000, atol=2, rtol=0)


def test_the_loss_of_the_guides_is_called_like_a_function(pipe, rows):
    pipe.scheduler.set_timesteps(1000, training=True)
    shared = {"input_image": rows[1]["image"], "height": 48, "width": 32, "cfg_scale": 1, "seed": None}
    shared, posi, _ = run_units(pipe.units, pipe, shared, {"prompt": "a red apple"}, {"negative_prompt": ""})
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(FlowMatchSFTLoss(pipe, **shared, **posi).item())
    assert losses[0] == losses[1] != losses[2]


def test_the_autoencoders_loss_is_its_formula_and_needs_no_other_model(training_module, samples):
    module = training_module(AutoencoderLoss(kl_weight=0.1))
    vae = module.pipe.vae
    assert module.pipe.dit is None and module.pipe.text_encoder is None
    pixels = torch.stack([torch.tensor(np.array(s.data["image"])).permute(2, 0, 1) for s in samples]) / 127.5 - 1
    posterior = vae.distribution(pixels)
    error = pixels - vae._decode(posterior.mean).sample[:, :, 0]
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1))
    expected = error.abs().mean((1, 2, 3)) + error.pow(2).mean((1, 2, 3)) + 0.1 * kl.mean((1, 2, 3, 4))
    torch.testing.assert_close(module(samples), expected)


@pytest.mark.parametrize(
    "task, lora", [(None, ADAPTER), (EVERYTHING, None), (AutoencoderLoss(), None)], ids=["lora", "full", "autoencoder"]
)
def test_frozen_weights_may_be_bf16_what_is_trained_is_fp32(training_module, samples, task, lora):
    module = training_module(task, lora, torch_dtype="bfloat16")
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in module.parameters() if not p.requires_grad} <= {torch.bfloat16}
    with torch.no_grad():
        found, expected = module(samples), training_module(task, lora)(samples)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0, rtol=0.03)


def test_sampling_in_the_middle_of_training_changes_nothing_of_it(training_module, samples):
    module = training_module(EVERYTHING)
    modes = [part.training for part in module.modules()]
    before = gradients(module, samples)
    with module.pipe.sampling() as pipe:
        assert not pipe.dit.training
        pipe("a red apple", height=32, width=32, num_inference_steps=1, cfg_scale=1)
    assert [part.training for part in module.modules()] == modes
    assert_same(gradients(module, samples), before, atol=0)


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, lora",
    [
        (None, ADAPTER),
        (None, LoRA(rank=2, target_modules="all-linear", models=["dit", "text_encoder"])),
        (None, None),
        (EVERYTHING, None),
        (FlowMatchSFT(trainable_models=["dit.transformer_blocks.1", "dit.proj_out"]), None),
        (FlowMatchSFT(trainable_models=["text_encoder"]), ADAPTER),
    ],
    ids=["lora", "lora of two models", "transformer", "transformer and text encoder", "two parts", "lora and encoder"],
)
def test_gradients_reach_exactly_what_is_trained(training_module, samples, task, lora):
    module = with_random_adapter(training_module(task, lora))
    _, reached = gradients(module, samples)
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    expected = {name for name in trainable if not UNREACHED.fullmatch(name.removeprefix("pipe."))}
    assert {name for name, gradient in reached.items() if gradient.any()} == expected
    assert all(gradient.isfinite().all() for gradient in reached.values())


def test_freezing_leaves_only_the_named_parts_trainable(pipe):
    pipe.train().requires_grad_(True)
    pipe.freeze_except(["dit.transformer_blocks.1", "vae"])
    trained = {name for name, parameter in pipe.named_parameters() if parameter.requires_grad}
    assert {re.match(r"dit\.transformer_blocks\.\d|\w*", name)[0] for name in trained} == {
        "dit.transformer_blocks.1",
        "vae",
    }
    assert [part.training for part in (pipe.dit, pipe.dit.transformer_blocks[1], pipe.text_encoder)] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("task, lora", [(None, ADAPTER), (EVERYTHING, None)], ids=["lora", "full"])
def test_training_leaves_frozen_tensors_as_they_are_to_the_bit(training_module, rows, tmp_path, task, lora):
    module = training_module(task, lora)
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    train(module, rows, tmp_path, learning_rate=1e-2, weight_decay=0.0)
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    tied = {"pipe.text_encoder.lm_head.weight"} if task else set()
    assert changed - tied == {name for name in trainable if not UNREACHED.fullmatch(name.removeprefix("pipe."))}


def test_training_lowers_the_loss(training_module, rows, samples, tmp_path):
    module = training_module(lora=LoRA(rank=8, target_modules="all-linear"))
    with torch.no_grad():
        before = module(samples).mean()
    train(module, rows, tmp_path, steps=6, learning_rate=1e-2)
    with torch.no_grad():
        assert module(samples).mean() < 0.9 * before


@pytest.mark.parametrize(
    "task, lora, message",
    [
        (FlowMatchSFT(trainable_models=["unet"]), None, "no model 'unet'; set task.trainable_models to some of dit"),
        (FlowMatchSFT(trainable_models=["dit.transformer_blocks.4"]), None, "no model 'dit.transformer_blocks.4'"),
        (FlowMatchSFT(trainable_models=["dit"]), ADAPTER, "'dit'.* in full and by LoRA at once"),
        (FlowMatchSFT(trainable_models=[]), None, "Nothing is trained"),
    ],
)
def test_a_choice_that_trains_nothing_sensible_is_refused(training_module, task, lora, message):
    with pytest.raises(ValueError, match=message):
        training_module(task, lora)


# Checkpointing -------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_takes_keyword_arguments_as_the_guides_do():
    layer, x = torch.nn.Bilinear(3, 3, 3), torch.randn(2, 3, requires_grad=True)
    results = [
        gradient_checkpoint_forward(layer, on, offload, input1=x, input2=x)
        for on, offload in ((False, False), (True, False), (True, True), (False, True))
    ]
    gradient = [torch.autograd.grad(result.sum(), x)[0] for result in results]
    for found, slope in zip(results[1:], gradient[1:], strict=True):
        assert torch.equal(found, results[0]) and torch.equal(slope, gradient[0])


# What is saved -------------------------------------------------------------------------------------------------------


def test_fully_trained_models_are_saved_under_their_released_names(training_module, rows, tiny, tmp_path):
    module = training_module(EVERYTHING)
    transformer, text_encoder = train(module, rows, tmp_path, steps=1, learning_rate=1e-2)
    assert (transformer.name, text_encoder.name) == ("epoch-0.dit.safetensors", "epoch-0.text_encoder.safetensors")
    released = load_file(tiny / "text_encoder" / "model.safetensors")
    assert released.keys() == load_file(text_encoder).keys()
    theirs = QwenImageTransformer2DModel.from_pretrained(tiny / "transformer")
    theirs.load_state_dict(load_file(transformer))
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, module.pipe.dit.get_parameter(name))
