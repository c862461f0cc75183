"""What holds for every model family; a new one is a row in families.py."""

import inspect
import traceback
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import ceil

import numpy as np
import pytest
import tiny
import torch
from families import FAMILIES, Family, clips, of_families
from miniatures.requests import (
    GUIDED,
    LORA,
    REQUEST,
    edited_from,
    encoded,
    further,
    gradients,
    image,
    made,
    sampled,
    samples,
    shaken,
)
from PIL import Image
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from diffsynth.cache.make import launch_data_process_task
from diffsynth.core.context_parallel import check_splittable
from diffsynth.core.data import CachedDataset, Sample, SampleAddress
from diffsynth.core.loader import save_safetensors
from diffsynth.core.memory.storage import stored_layers
from diffsynth.diffusion.base_pipeline import BasePipeline
from diffsynth.diffusion.distillation.discriminator import Discriminator, logits
from diffsynth.diffusion.distillation.roles import TEACHER, Roles
from diffsynth.diffusion.pipeline.components import Network, save
from diffsynth.diffusion.pipeline.remembered import UnitMemory
from diffsynth.diffusion.pipeline.request import ImageRequest, defaults_of
from diffsynth.diffusion.pipeline.samplers import SAMPLERS
from diffsynth.diffusion.pipeline.vae import Latents
from diffsynth.diffusion.randomness import SampleRNG
from diffsynth.pipelines.flux1_image import Flux1ImagePipeline
from diffsynth.pipelines.flux2_image import Flux2ImagePipeline
from diffsynth.pipelines.qwen_image import QwenImagePipeline
from diffsynth.pipelines.wan import WanPipeline
from diffsynth.pipelines.wan_vace import WanVACEPipeline
from diffsynth.training.accelerator import make_accelerator

TRAINED = pytest.mark.parametrize("trained, lora", [((), LORA), (("dit", "text_encoder"), None)], ids=["lora", "full"])


# The declaration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_the_call_and_the_constructor_name_their_arguments(family):
    call, constructor = (
        inspect.signature(getattr(family.pipeline, name)).parameters for name in ("__call__", "from_components")
    )
    assert {"prompt", *defaults_of(family.pipeline.request)} < set(call)
    assert {*family.pipeline.components, "torch_dtype", "height", "cfg_scale", "training"} <= set(constructor)
    assert "Args:" in family.pipeline.__call__.__doc__ and "seed:" in family.pipeline.__call__.__doc__


@pytest.mark.parametrize("part", ["request", "components", "latents", "model_fn", "sigma_grid", "unit_classes"])
def test_a_family_whose_declaration_lacks_a_part_is_named_when_its_class_is_made(part):
    parts = {
        "request": ImageRequest,
        "components": {"dit": Network("Nothing")},
        "latents": Latents(channels=1, factor=1),
        "model_fn": staticmethod(lambda dit, latents, timestep: latents),
        "sigma_grid": staticmethod(lambda num_inference_steps, denoising_strength=1.0: torch.ones(1)),
        "unit_classes": (),
    }
    type("Whole", (BasePipeline,), parts)
    with pytest.raises(TypeError, match=f"Lacking declares no {part}|Lacking.components names no Network"):
        type("Lacking", (BasePipeline,), {name: value for name, value in parts.items() if name != part})


# Sampling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part, value, message",
    [
        ("components", {"dit": "a network"}, "expected a Network or Folder by each name"),
        ("unit_classes", ("ShapeChecker",), "expected classes of units"),
        ("request", dict, "expected a dataclass such as ImageRequest"),
    ],
)
def test_a_part_of_another_kind_is_refused_when_the_class_is_made(part, value, message):
    with pytest.raises(TypeError, match=f"Wrong.{part} is .*{message}"):
        type("Wrong", (FAMILIES[0].pipeline,), {part: value})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"denoising_strength": 1.5}, r"denoising_strength is 1.5; expected a number in \(0, 1\]"),
        ({"num_inference_steps": 0}, r"num_inference_steps is 0; expected a whole number in \[1, 10000\]"),
        ({"inpaint_mask": image(0)}, "give input_image too"),
    ],
)
def test_a_request_that_cannot_be_sampled_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES[0].build().prepare([REQUEST | change])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family.reference], ids=str)
def test_latents_are_those_that_diffusers_samples(family, guidance):
    edits = {"edit_image": edited_from(0), "edit_image_auto_resize": False} if family.edits else {}
    edits |= {"controlnet_image": image(29), "controlnet_scale": 0.8} if family.controls else {}
    edits |= further(family, 0)
    requests = [
        GUIDED | {"cfg_scale": guidance, "prompt": prompt, **edits} for prompt in ("a red apple", "a line " * 9)
    ]
    pipe = family.load()
    shared, posi, nega = pipe.prepare(requests)
    with torch.no_grad():
        found = pipe.denoise(shared, posi, nega)
    assert (found[0] - found[1]).abs().max() > 1e-2
    assert_close(found, family.reference(requests, shared["noise"]), atol=1e-4, rtol=0)


@of_families
def test_requests_of_a_batch_are_sampled_as_if_alone(family: Family):
    pipe = family.load()
    requests = [GUIDED, GUIDED | {"prompt": "", "seed": 2}, GUIDED | {"prompt": "a very long word " * 5, "seed": 3}]
    if family.edits:
        requests = [request | {"edit_image": edited_from(number)} for number, request in enumerate(requests)]
    alone = torch.cat([sampled(pipe, request) for request in requests])
    assert_close(sampled(pipe, *requests), alone, atol=1e-5, rtol=1e-4)
    assert (alone[0] - alone[1]).abs().max() > 1e-2


@of_families
def test_prompt_guidance_and_seed_decide_what_is_sampled(family: Family):
    pipe = family.load()
    plain = sampled(pipe, REQUEST)
    for change in ({"prompt": "a tiger"}, {"seed": 2}, {"cfg_scale": 3.0}):
        assert (sampled(pipe, REQUEST | change) - plain).abs().max() > 1e-3, change
    assert torch.equal(sampled(pipe, REQUEST), plain)


@of_families
def test_samplers_that_follow_the_path_end_together(family: Family):
    pipe = family.load()
    ends = {name: sampled(pipe, REQUEST | {"sampler": name, "num_inference_steps": 32}) for name in SAMPLERS}
    off = {name: (end - ends["heun"]).norm() / end.norm() for name, end in ends.items()}
    assert off["euler"] < 0.1 and off["dpmpp_2m"] < 0.1
    assert off["renoise"] > 0.3  # it leaves the path


@of_families
def test_black_of_an_inpainting_mask_keeps_the_image(family: Family):
    pipe = family.load()
    if family.num_frames:
        pytest.skip("videos have no inpaint_mask")
    width, height = made(family).size
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (0, 0, width, height // 3))  # of 48 pixels: an edge between latent pixels of 16 as well as of 8
    request = REQUEST | {"input_image": made(family), "inpaint_mask": mask, "num_inference_steps": 2}
    kept = encoded(pipe, made(family))
    for sampler in ("euler", "heun", "dpmpp_2m"):
        found = sampled(pipe, request | {"sampler": sampler})
        sampled_rows, kept_rows = slice(found.shape[2] // 3), slice(ceil(found.shape[2] / 3), None)
        assert_close(found[:, :, kept_rows], kept[:, :, kept_rows], atol=1e-4, rtol=1e-4)
        assert (found[:, :, sampled_rows] - kept[:, :, sampled_rows]).abs().max() > 1e-2


@of_families
def test_what_sampling_starts_from_is_noised_to_the_first_level(family: Family):
    pipe = family.load()
    shared, _, _ = pipe.prepare([REQUEST | {pipe.media.argument: made(family), "denoising_strength": 0.4}])
    sigma = pipe.scheduler.sigmas[0]
    assert 0.3 < sigma < 0.98
    clean = encoded(pipe, made(family))
    assert_close(shared["latents"], (1 - sigma) * clean + sigma * shared["noise"])


@of_families
def test_an_image_or_video_comes_back_from_its_latents_in_its_size(family: Family):
    pipe = family.load()
    (found,) = pipe.generate([REQUEST | {"num_inference_steps": 1}])
    expected, media = made(family), pipe.media
    assert media.size(found) == media.size(expected)
    pixels = torch.cat([media.preprocess(value, pipe.device, pipe.torch_dtype) for value in (expected, found)])
    latents = pipe.vae.encode(pixels)
    assert latents.shape == (2, *pipe.latents.shape(**pipe.latents.size_of(pipe.complete(REQUEST)))[1:])
    assert pipe.vae.decode(latents).shape == pixels.shape


@of_families
def test_one_tile_as_large_as_the_image_is_the_whole_image_and_smaller_ones_are_not(family: Family):
    pipe = family.load()
    size = 16 * pipe.latents.factor, 12 * pipe.latents.factor
    pixels = pipe.preprocess_image(image(0, size, pipe.media.mode))
    latents = pipe.vae.encode(pixels)
    for run, whole in ((pipe.vae.encode, pixels), (pipe.vae.decode, latents)):
        expected, tiles = run(whole), run(whole, tiled=True, tile_size=8, tile_stride=4)
        assert_close(run(whole, tiled=True), expected)
        assert tiles.shape == expected.shape and (tiles - expected).abs().max() > 0


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.edits], ids=str)
@pytest.mark.parametrize(
    "edit_image, options, message",
    [
        ("a.png", {}, "edit_image is or holds 'a.png', expected images; .* dataset.data_file_keys"),
        ([image(0), 3], {}, "edit_image is or holds 3, expected images"),
        (image(0, (60, 64)), {"edit_image_auto_resize": False}, "is 60 x 64 pixels, expected multiples of (16|32)"),
    ],
)
def test_an_edit_image_that_is_no_image_or_has_other_sides_is_named(family: Family, edit_image, options, message):
    with pytest.raises(ValueError, match=message):
        family.build().prepare([REQUEST | {"edit_image": edit_image} | options])


# Training -------------------------------------------------------------------------------------------------------------


@of_families
@TRAINED
def test_a_batch_has_the_mean_loss_and_gradient_of_its_samples(family: Family, trained, lora):
    module, batch = shaken(family.module(family.task(*trained), lora).load(), 0.01), samples(family)
    losses, gradient = gradients(module, [batch])
    alone, mean = gradients(module, [[sample] for sample in batch])
    assert_close(losses, alone, atol=1e-5, rtol=1e-5)
    assert_close(gradient, mean, atol=1e-5, rtol=1e-3)


@of_families
def test_gradients_reach_all_that_is_trained_and_nothing_else(family: Family):
    module = shaken(family.module(lora=LORA).load())
    _, found = gradients(module, [samples(family)])
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained and trained == {name for name, gradient in found.items() if gradient.any()}


@of_families
@TRAINED
def test_checkpointing_changes_nothing(family: Family, trained, lora):
    recipes = [{}, {"checkpointing": "blocks"}, {"checkpointing": "blocks", "offload_activations": True}]
    plain, *checkpointed = [
        gradients(shaken(family.module(family.task(*trained), lora, **recipe).load(), 0.01), [samples(family)])
        for recipe in recipes
    ]
    for found in checkpointed:
        assert_close(found, plain, atol=1e-6, rtol=1e-5)


@of_families
def test_a_discriminator_scores_each_sample_by_its_own_tokens(family: Family):
    pipe = family.load()
    roles = Roles(pipe, None, heads=Discriminator(hidden=8).heads(pipe.dit, 0))

    @torch.no_grad()
    def scores(*requests) -> torch.Tensor:
        shared, posi, _ = pipe.prepare([request | further(family, 0) for request in requests])
        levels = torch.full((len(requests),), 0.9)
        return logits(roles, TEACHER, shared["latents"], levels, {**shared, **posi})

    requests = [REQUEST, REQUEST | {"seed": 2}]
    both = scores(*requests)
    assert_close(both, torch.cat([scores(request) for request in requests]), atol=1e-5, rtol=1e-4)
    assert (both[0] - both[1]).abs().max() > 1e-4


class BlockingCopies(TorchDispatchMode):
    """Notes where tensors go from the CPU to the device other than by `host_memory.sent`, which does not wait."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        devices = {tensor.device.type for tensor in (made, *args) if isinstance(tensor, torch.Tensor)}
        if func._overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_) and len(devices) > 1:
            stack = traceback.extract_stack()
            ours = [str(call) for call in stack if "diffsynth" in call.filename]
            self.found += ours[-1:] if all(call.name != "sent" for call in stack) else []
        return made


@pytest.fixture
def meta_has_autocast(monkeypatch):
    """Let libraries switch off the autocast of the device `meta`, which has none."""
    autocast = torch.autocast
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda device_type, **how: nullcontext() if device_type == "meta" else autocast(device_type, **how),
    )


@of_families
def test_a_micro_batch_reads_no_value_from_its_device_and_sends_without_waiting(family: Family, meta_has_autocast):
    """Once its inputs are remembered. The device is `meta`, which refuses to tell a value."""
    module, memory = family.module(lora=LORA, checkpointing="blocks").load(), UnitMemory(1.0)
    rng, rows = SampleRNG(0, [SampleAddress(0, number) for number in range(2)]), samples(family)[1:]

    def micro_batch() -> BlockingCopies:
        with BlockingCopies() as copies:
            module.loss(rows, rng, memory).mean().backward()
        return copies

    micro_batch()
    module.to("meta").zero_grad()
    module.pipe.device = torch.device("meta")
    micro_batch()  # libraries keep tables on each device
    assert micro_batch().found == []


# tests/core/test_context_parallel.py compares them. VACE's network, which is of another class, is refused.
SPLIT = (Flux1ImagePipeline, Flux2ImagePipeline, QwenImagePipeline, WanPipeline)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_tokens_are_split_over_devices_or_the_network_is_refused_by_its_name(family: Family):
    pipe = family.build()
    if isinstance(pipe, SPLIT) and not isinstance(pipe, WanVACEPipeline):
        return check_splittable(pipe.network, 1)
    name = type(pipe.network).__name__
    with pytest.raises(ValueError, match=f"{name} has no _cp_plan|{name}: .* does not exchange split tokens"):
        check_splittable(pipe.network, 1)


@of_families
def test_weights_in_8_bits_change_the_loss_little(family: Family):
    plain = family.module(lora=LORA).load()
    stored = family.module(lora=LORA, storage="int8").load()
    assert stored_layers(stored.pipe.network) and not stored_layers(plain.pipe.network)
    assert_close(stored(samples(family)).detach(), plain(samples(family)).detach(), atol=0, rtol=0.05)


@of_families
@TRAINED
def test_two_stages_have_the_losses_of_one(family: Family, trained, lora, tmp_path):
    rows = family.data()
    rows.scan()
    make = partial(family.module, family.task(*trained), lora)
    launch_data_process_task(make_accelerator("cpu", "float32"), rows, make(), tmp_path)
    losses = [
        make().load(cached=not data.needs_encoders)([Sample(data[n], 0, n) for n in range(4)])
        for data in (rows, CachedDataset(str(tmp_path)))
    ]
    assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-6)


@of_families
def test_an_adapter_is_saved_and_loads_with_what_it_changes(family: Family, tmp_path):
    module = family.module(lora=LORA)
    sampling = module.pipe.models_of(module.pipe.units, model_fn=True)
    module = shaken(module.load(also=sampling), strength=0.5)
    tensors, metadata = module.export_weights()["lora"]
    save_safetensors(tensors, tmp_path / "lora.safetensors", metadata)
    pipe = family.load()
    before = sampled(pipe, REQUEST)
    pipe.load_lora("dit", tmp_path / "lora.safetensors")
    after = sampled(pipe, REQUEST)
    with module.pipe.sampling():
        assert_close(after, sampled(module.pipe, REQUEST), atol=1e-5, rtol=1e-4)
    assert (after - before).abs().max() > 1e-3


@of_families
def test_a_network_that_is_saved_is_read_again(family: Family, tmp_path):
    pipe = family.load()
    save(pipe.network, tmp_path)
    again = replace(family, parts=family.parts | {"dit": str(tmp_path)}).load()
    assert type(again.network) is type(pipe.network)
    assert torch.equal(sampled(again, REQUEST), sampled(pipe, REQUEST))


# Runs -----------------------------------------------------------------------------------------------------------------


def run(family: Family, folder, *overrides: str):
    """Overrides of a run of the family on pairs of pictures."""
    given = [o for o in tiny.train_overrides(folder) if not o.startswith("model.")]
    own = [*family.data_overrides, f"task.extra_inputs=[{','.join(family.extra_inputs)}]", *overrides]
    if family.references == "input_image" and "validation=base" in overrides:
        own.append(f"+validation.options.input_image={clips()}/0.png")
    return tiny.merged([*family.overrides, *given], own)


@of_families
def test_a_run_trains_evaluates_exports_and_resumes(family: Family, tmp_path):
    evaluated = [
        "validation=base",
        "validation.prompts=[a red emoji]",
        "validation.options.num_inference_steps=1",
    ]
    run_dir = tiny.run(run(family, tmp_path, *evaluated, "max_steps=2"))
    assert len(list((run_dir / "samples").glob("step-*.png"))) == 2
    tiny.run(run(family, tmp_path, *evaluated, "max_steps=3"))  # goes on where the shorter run has ended
    assert [line["step"] for line in tiny.metrics(run_dir) if "loss" in line] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) for line in tiny.metrics(run_dir) if "loss" in line)
    assert tiny.weights(run_dir)[-1] == "step-3.safetensors"


@of_families
def test_a_run_is_planned(family: Family, tmp_path):
    cfg = tiny.compose("plan", *run(family, tmp_path), f"path={tmp_path}/plan")
    table = tiny.call("plan", cfg)
    assert "| train |" in table and "| cache |" in table
