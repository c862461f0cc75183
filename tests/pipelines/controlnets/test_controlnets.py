"""ControlNets of their families: what diffusers samples with them, how they begin, when they act, what is refused."""

import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from families import FAMILIES
from miniatures import flux1, qwen_image, sd3, z_image
from miniatures.requests import GUIDED, REQUEST, image, sampled, samples
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from controlnet import controlnet as start_controlnet
from diffsynth.core.loader import ModelConfig
from diffsynth.diffusion.base_pipeline import BasePipeline
from diffsynth.diffusion.controlnet.family import CONTROLNET_SLOTS
from diffsynth.diffusion.controlnet.inputs import ControlEmbedder
from diffsynth.diffusion.controlnet.several import BlockSums
from diffsynth.diffusion.loss import FlowMatchSFT
from diffsynth.diffusion.pipeline.components import library_name
from diffsynth.diffusion.pipeline.generation import with_images
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.pipelines.flux1_image import Flux1ImagePipeline
from diffsynth.pipelines.qwen_image import QwenImagePipeline
from diffsynth.pipelines.sd3 import SD3Pipeline
from diffsynth.pipelines.z_image import ZImagePipeline

SIZE = (32, 48)
CONTROL = {"controlnet_image": image(3, SIZE), "controlnet_scale": 0.8}
FAMILY = next(family for family in FAMILIES if family.name == "z_image_controlnet")


def mask(size: tuple[int, int] = SIZE) -> Image.Image:
    """White in its lower half."""
    pixels = Image.new("L", size)
    pixels.paste(255, (0, size[1] // 2, *size))
    return pixels


INPAINT = {"controlnet_inpaint_image": image(4, SIZE), "controlnet_inpaint_mask": mask()}


def pipeline(controlnet: Path | None = None, base: Path | None = None) -> ZImagePipeline:
    return controlled("z_image", controlnet or z_image.controlnet(), base=base)


# The pipeline, the folder of its model, the folder of each component, settings.
BASES = {
    "z_image": (ZImagePipeline, z_image.base, z_image.PARTS, {}),
    "qwen_image": (QwenImagePipeline, tiny.model, tiny.COMPONENTS, {}),
    "flux1": (Flux1ImagePipeline, flux1.dev, flux1.PARTS, {"max_sequence_length": flux1.MAX_TOKENS}),
    "sd3": (SD3Pipeline, sd3.medium, sd3.PARTS, {"max_sequence_length": sd3.T5_TOKENS}),
}


def controlled(name: str, *controlnets: Path, base: Path | None = None) -> BasePipeline:
    """A family's pipeline with one ControlNet or several, without its weights."""
    kind, folder, parts, settings = BASES[name]
    files = {part: (base or folder()) / path for part, path in parts.items()} | dict(
        zip(CONTROLNET_SLOTS, controlnets, strict=False)
    )
    configs = {part: ModelConfig(path=str(path)) for part, path in files.items()}
    pipe = kind.from_components(**configs, torch_dtype="float32", **settings)
    pipe.progress_bar = iter
    return pipe


def check_sampled(name: str, requests: list[dict], reference: Callable, *controlnets: Path) -> None:
    """Assert that a family with ControlNets samples the latents that `reference(requests, noise)` returns."""
    pipe = controlled(name, *controlnets)
    pipe.load_models()
    shared, posi, nega = pipe.prepare(requests)
    with torch.no_grad():
        found = pipe.denoise(shared, posi, nega)
    assert_close(found, reference(requests, shared["noise"]), atol=1e-4, rtol=0)


def loaded(controlnet: Path | None = None) -> ZImagePipeline:
    pipe = pipeline(controlnet)
    pipe.load_models()
    return pipe


@pytest.mark.parametrize("guidance", tiny.mostly_slow([1.0, 3.0], 3.0))
@pytest.mark.parametrize("inpaint", [{}, INPAINT], ids=["tile", "inpaint"])
def test_a_controlnet_that_reads_masks_samples_as_in_diffusers(inpaint, guidance):
    request = GUIDED | CONTROL | inpaint | {"cfg_scale": guidance}
    requests = [request, request | {"prompt": "a line emoji of a tiger face, looking at an umbrella"}]
    pipe = loaded(z_image.controlnet(33))
    shared, posi, nega = pipe.prepare(requests)
    with torch.no_grad():
        found = pipe.denoise(shared, posi, nega)
    assert_close(found, z_image.sampled_with_control(requests, shared["noise"], 33), atol=1e-4, rtol=0)


@pytest.mark.parametrize("guidance", tiny.mostly_slow([1.0, 3.0]))
def test_qwen_images_controlnet_for_inpainting_samples_as_in_diffusers(guidance):
    request = GUIDED | CONTROL | {"controlnet_inpaint_mask": mask(), "cfg_scale": guidance}
    controlnet = qwen_image.controlnet(qwen_image.INPAINT_CHANNELS)
    check_sampled("qwen_image", [request], qwen_image.sampled_by_diffusers, controlnet)


BATCH = [GUIDED | CONTROL, GUIDED | CONTROL | {"prompt": "a line emoji of a tiger face, looking at an umbrella"}]
SD3_KINDS = {
    "inpaint": ({"extra_conditioning_channels": 1}, {"controlnet_inpaint_mask": mask()}),
    # As those of 3.5 large: no text, the transformer's positions, pooled embeddings.
    "large": ({"joint_attention_dim": None, "use_pos_embed": False, "force_zeros_for_pooled_projection": False}, {}),
}


@pytest.mark.parametrize("guidance", tiny.mostly_slow([1.0, 3.0], 3.0))
@pytest.mark.parametrize("kind", tiny.mostly_slow(SD3_KINDS, "inpaint"))
def test_each_kind_of_sd3s_controlnets_samples_as_in_diffusers(kind, guidance):
    sizes, inputs = SD3_KINDS[kind]
    controlnet = sd3.controlnet(**sizes)
    requests = [request | inputs | {"cfg_scale": guidance} for request in BATCH]
    check_sampled("sd3", requests, lambda *given: sd3.sampled_with_control(*given, controlnet), controlnet)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_flux1s_controlnet_for_several_kinds_of_images_samples_as_in_diffusers(guidance):
    controlnet = flux1.controlnet(num_mode=3)
    requests = [request | {"cfg_scale": guidance, "controlnet_mode": 2} for request in BATCH]
    check_sampled("flux1", requests, lambda *given: flux1.sampled_with_control(*given, controlnet), controlnet)


@pytest.mark.slow
def test_flux1_inpaints_with_a_controlnet_as_diffusers():
    inputs = {"input_image": image(5, SIZE), "inpaint_mask": mask(), "cfg_scale": 1.0}
    requests = [request | inputs for request in BATCH]
    check_sampled("flux1", requests, flux1.sampled_with_control, flux1.controlnet())


# Several --------------------------------------------------------------------------------------------------------------

TWO_IMAGES = {"controlnet_image": [image(3, SIZE), image(6, SIZE)], "controlnet_scale": [0.8, 0.5]}
PARTS_OF_STEPS = {"controlnet_start": [0.0, 0.3], "controlnet_end": [0.7, 1.0]}
TWO = {
    "flux1": (flux1, lambda: (flux1.controlnet(num_mode=3), flux1.controlnet()), {"controlnet_mode": [2, 0]}),
    "sd3": (sd3, lambda: (sd3.controlnet(), sd3.controlnet(qk_norm=None)), {}),
}


def test_a_controlnet_of_flux1_without_guidance_embedding_samples_as_in_diffusers():
    network = flux1.controlnet(guidance_embeds=False)
    request = GUIDED | CONTROL | {"cfg_scale": 1.0}
    check_sampled("flux1", [request], lambda *given: flux1.sampled_with_control(*given, network), network)


@pytest.mark.parametrize("guidance", tiny.mostly_slow([1.0, 3.0], 3.0))
@pytest.mark.parametrize("name", tiny.mostly_slow(TWO, "flux1"))
def test_two_controlnets_sample_as_in_diffusers(name, guidance):
    family, networks, inputs = TWO[name]
    requests = [request | TWO_IMAGES | PARTS_OF_STEPS | inputs | {"cfg_scale": guidance} for request in BATCH]
    both = networks()
    check_sampled(name, requests, lambda *given: family.sampled_with_control(*given, *both), *both)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["z_image", "qwen_image"])
def test_a_controlnet_twice_is_one_with_the_sum_of_the_scales(name):
    network = {"z_image": z_image, "qwen_image": qwen_image}[name].controlnet()
    one, two = controlled(name, network), controlled(name, network, network)
    for pipe in (one, two):
        pipe.load_models()
    request = GUIDED | {"num_inference_steps": 1}
    same = {"controlnet_image": [CONTROL["controlnet_image"]] * 2, "controlnet_scale": [0.2, 0.3]}
    expected = sampled(one, request | CONTROL | {"controlnet_scale": 0.5})
    assert_close(sampled(two, request | same), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_each_of_two_controlnets_reads_its_own_image_in_its_own_steps():
    pipe, calls = controlled("sd3", sd3.controlnet(), sd3.controlnet(extra_conditioning_channels=1)), {}
    pipe.load_models()
    for name in CONTROLNET_SLOTS[:2]:
        calls[name] = []
        hook = partial(lambda seen, _, __, given: seen.append(given["controlnet_cond"].shape[1]), calls[name])
        getattr(pipe, name).register_forward_pre_hook(hook, with_kwargs=True)
    inputs = {"controlnet_inpaint_mask": mask(), "controlnet_start": [0.0, 0.5], "controlnet_end": [0.75, 1.0]}
    sampled(pipe, REQUEST | TWO_IMAGES | inputs | {"num_inference_steps": 4})
    assert calls == {"controlnet": [16] * 3, "controlnet_2": [17] * 2}


def test_sums_are_made_for_blocks_of_controlnets_of_different_sizes():
    few, many = ([torch.tensor(float(10**place * n)) for n in range(count)] for place, count in ((0, 2), (1, 3)))
    assert [int(total) for total in BlockSums([few, many], 6, rounds_up=True)] == [0, 0, 10, 11, 21, 21]
    assert [int(total) for total in BlockSums([few, many], 4, rounds_up=True)] == [0, 0, 11, 11]
    assert [int(total) for total in BlockSums([few, many], 4, rounds_up=False)] == [0, 0, 11, 21]


# How they begin, and when they act ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux1", "sd3"])
def test_a_controlnet_begins_with_the_first_blocks_and_changes_nothing(name, tmp_path):
    folder = start_controlnet(lambda device: controlled(name), blocks=1, output=str(tmp_path / "new"))
    base, controlnet = (
        load_file(next(path.glob("*.safetensors"))) for path in (BASES[name][1]() / "transformer", folder)
    )
    copied = {key for key in controlnet if not key.startswith(("controlnet_", "pos_embed_input"))}
    assert copied <= base.keys() and all(torch.equal(controlnet[key], base[key]) for key in copied)
    assert not any(controlnet[key].any() for key in controlnet.keys() - copied)
    kind = diffusers.FluxControlNetModel if name == "flux1" else diffusers.SD3ControlNetModel
    assert len(kind.from_pretrained(folder).transformer_blocks) == 1
    pipe = controlled(name, folder)
    pipe.load_models()
    assert_close(sampled(pipe, REQUEST | CONTROL), sampled(pipe, REQUEST), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_qwen_images_controlnet_begins_as_copies_of_the_first_blocks(tmp_path):
    folder = start_controlnet(lambda device: controlled("qwen_image"), blocks=2, output=str(tmp_path / "new"))
    base, controlnet = (load_file(next(path.glob("*.safetensors"))) for path in (tiny.model() / "transformer", folder))
    shared = controlnet.keys() & base.keys()
    assert controlnet.keys() - shared == {key for key in controlnet if key.startswith("controlnet_")}
    assert all(torch.equal(controlnet[key], base[key]) for key in shared)
    assert not any(controlnet[key].any() for key in controlnet.keys() - shared)


def test_the_outputs_for_several_images_are_added_and_a_scale_of_zero_is_no_control():
    pipe = loaded()
    request = REQUEST | {"num_inference_steps": 1}
    plain, one = sampled(pipe, request), sampled(pipe, request | CONTROL | {"controlnet_scale": 0.5})
    same = {"controlnet_image": [CONTROL["controlnet_image"]] * 2, "controlnet_scale": [0.2, 0.3]}
    assert_close(sampled(pipe, request | same), one, atol=1e-5, rtol=1e-4)
    assert torch.equal(sampled(pipe, request | CONTROL | {"controlnet_scale": 0.0}), plain)
    assert (one - plain).abs().max() > 1e-3


def test_a_controlnet_acts_between_its_start_and_its_end():
    pipe, called = loaded(), []
    pipe.controlnet.register_forward_pre_hook(lambda *_: called.append(1))
    for start_, end, count in ((0.0, 1.0, 4), (0.0, 0.5, 2), (0.3, 1.0, 2), (0.5, 0.6, 0)):
        sampled(pipe, REQUEST | CONTROL | {"num_inference_steps": 4, "controlnet_start": start_, "controlnet_end": end})
        assert len(called) == count
        called.clear()


@pytest.mark.parametrize("inpaint", [False, True])
def test_a_controlnet_begins_as_copies_of_layers_and_changes_nothing(inpaint, tmp_path):
    folder = start_controlnet(lambda device: pipeline(), blocks=3, inpaint=inpaint, output=str(tmp_path / "controlnet"))
    base, controlnet = (
        load_file(next(path.glob("*.safetensors"))) for path in (z_image.base() / "transformer", folder)
    )
    for number, place in enumerate((0, 2, 4)):
        key = "attention.to_q.weight"
        assert torch.equal(controlnet[f"control_layers.{number}.{key}"], base[f"layers.{place}.{key}"])
    assert diffusers.ZImageControlNetModel.from_pretrained(folder).config.control_in_dim == (33 if inpaint else 16)
    control = CONTROL | (INPAINT if inpaint else {})
    pipe = loaded(folder)
    assert_close(sampled(pipe, REQUEST | control), sampled(pipe, REQUEST), atol=1e-6, rtol=0)


LAYERS = {"z_image": 6, "qwen_image": 4, "flux1": 2, "sd3": 3}


@pytest.mark.parametrize("name", tiny.mostly_slow(LAYERS, "z_image", "qwen_image"))
def test_blocks_are_at_most_those_of_the_transformer(name, tmp_path):
    count = LAYERS[name]
    folder = start_controlnet(lambda device: controlled(name), output=str(tmp_path / "new"))
    config = json.loads((folder / "config.json").read_text())
    layers = config["control_layers_places"] if name == "z_image" else range(config["num_layers"])
    assert list(layers) == list(range(count))
    pipe = controlled(name, folder)
    pipe.load_models()
    assert sampled(pipe, REQUEST | CONTROL | {"num_inference_steps": 1}).isfinite().all()
    message = f"blocks={count + 1}, but the transformer has {count} blocks to copy; set blocks={count} or less"
    with pytest.raises(ValueError, match=message):
        start_controlnet(lambda device: controlled(name), blocks=count + 1, output=str(tmp_path / "more"))
    assert not (tmp_path / "more").exists()


@pytest.mark.slow
def test_the_seed_is_that_of_the_layers_that_are_neither_copied_nor_zero(tmp_path):
    """Such as the layer of Z-Image that reads an image with a mask, which the transformer does not have."""
    start = partial(start_controlnet, lambda device: pipeline(), blocks=1, inpaint=True)
    folders = [start(seed=seed, output=str(tmp_path / str(n))) for n, seed in enumerate((0, 0, 1))]
    one, same, other = (load_file(next(folder.glob("*.safetensors"))) for folder in folders)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["emoji_z_image", "emoji"])
def test_the_command_that_is_printed_trains(model, tmp_path):
    """With an option of a model with a ControlNet, and without."""
    folder = tmp_path / "my controlnet"
    shown = tiny.process(sys.executable, "controlnet.py", f"model={model}", f"output={folder}")
    python, script, *words = shlex.split(shown.splitlines()[-1])
    assert (python, script) == ("python", "train.py")
    few = ["max_steps=1", "batch_size=1", "device=cpu", "validation=none", "lr_scheduler.num_warmup_steps=0"]
    assert "Finished" in tiny.process(sys.executable, script, *words, *few, f"output_root={tmp_path}/runs")


TRAINED = {"z_image_controlnet": z_image, "flux1_controlnet": flux1, "sd3_5_controlnet": sd3}


def trained(name: str) -> PipelineTrainingModule:
    """A module that trains a family's ControlNet, with the gradients of a batch."""
    family = next(family for family in FAMILIES if family.name == name)
    module = family.module(family.task("controlnet")).load()
    module(samples(family)).mean().backward()
    return module


@pytest.mark.parametrize("name", tiny.mostly_slow(TRAINED, "z_image_controlnet"))
def test_a_step_changes_the_controlnet_and_leaves_the_base_as_it_is(name):
    module = trained(name)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    torch.optim.SGD(module.trainable_parameters(), lr=1.0).step()
    changed = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and all(name.startswith("pipe.controlnet.") for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_gradients_reach_the_whole_controlnet_which_is_exported_as_diffusers_names_it(name):
    module = trained(name)
    without = {name for name, p in module.pipe.controlnet.named_parameters() if p.grad is None}
    # Outputs for SD3's last block, which has no text, are not added, and nobody reads the text of the one before.
    last = "transformer_blocks.1", "transformer_blocks.2", "controlnet_blocks.2"
    assert all(part.startswith(last) for part in without) if name == "sd3_5_controlnet" else without == set()
    assert "transformer_blocks.1.attn.to_q.weight" not in without
    exported = module.export_weights()["controlnet"][0]
    kind = getattr(diffusers, library_name(type(module.pipe.controlnet)))
    assert exported.keys() == kind.from_pretrained(TRAINED[name].controlnet()).state_dict().keys()


@pytest.mark.parametrize(
    "change, message",
    [
        (INPAINT, "this ControlNet reads 16 channels"),
        ({"controlnet_image": "a.png"}, "controlnet_image is or holds 'a.png', expected images"),
        ({"controlnet_inpaint_mask": "a.png"}, "controlnet_inpaint_mask is or holds 'a.png', expected images"),
        ({"controlnet_scale": -1.0}, "controlnet_scale is -1.0; expected a number of at least 0, or a list"),
        ({"controlnet_end": 1.5}, r"controlnet_end is 1.5; expected a number in \[0, 1\]"),
    ],
)
def test_images_that_a_controlnet_cannot_read_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        pipeline().prepare([REQUEST | CONTROL | change])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"controlnet_inpaint_mask": None}, "controlnet_inpaint_image is given without controlnet_inpaint_mask"),
        ({"controlnet_inpaint_image": None}, "controlnet_inpaint_mask is given without controlnet_inpaint_image"),
        ({"controlnet_image": None}, "controlnet_inpaint_mask is given without controlnet_image"),
        ({"controlnet_inpaint_mask": mask((64, 64))}, "is 64 x 64 pixels and controlnet_inpaint_image 32 x 48"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        pipeline(z_image.controlnet(33)).prepare([REQUEST | CONTROL | INPAINT | change])


def test_a_training_without_images_that_control_is_refused_before_weights_are_read():
    module = FAMILY.module(FlowMatchSFT(trainable_models=["controlnet"]))
    with pytest.raises(ValueError, match="the training reads no column controlnet_image; set task.extra_inputs"):
        module.load()
    assert next(module.pipe.controlnet.parameters()).is_meta


UNREAD = {
    "z_image controlnet_image": "model.controlnet is null, and without it nothing reads the image; take .*_controlnet",
    "z_image edit_image": "model.siglip_processor is null, .*; take model=z_image_omni, or leave edit_image out",
    "emoji edit_image": "model.processor is null, .*; take a model for editing, such as model=qwen_image_edit",
    "emoji controlnet_inpaint_mask": "model.controlnet is null",
}


@pytest.mark.parametrize("case", UNREAD)
def test_an_image_that_nothing_reads_is_refused_in_sampling_and_in_training(case, no_weights_are_read):
    name, column = case.split()
    family = next(family for family in FAMILIES if family.name == name)
    with pytest.raises(ValueError, match=f"^{column} is given, but {UNREAD[case]}"):
        family.build().complete(REQUEST | {column: image(3)})
    with pytest.raises(ValueError, match=f"^task.extra_inputs: {column} is given, but {UNREAD[case]}"):
        family.module(FlowMatchSFT(extra_inputs=[column]))


def test_a_controlnet_of_another_base_is_refused_before_weights_are_read(no_weights_are_read):
    with pytest.raises(ValueError, match="Z-Image-Omni takes no ControlNet"):
        pipeline(base=z_image.omni()).load_models()


@pytest.mark.parametrize(
    "name, known",
    [
        ("z_image", {"controlnet_inpaint_image", "controlnet_inpaint_mask"}),
        ("qwen_image", {"controlnet_inpaint_mask"}),
        ("sd3", {"controlnet_inpaint_mask"}),
        ("flux1", set()),
    ],
)
def test_a_family_takes_only_those_images_to_inpaint_that_its_controlnets_read(name, known):
    pipe = BASES[name][0]()
    assert known <= pipe.arguments
    for argument in INPAINT.keys() - known:
        with pytest.raises(ValueError, match=f"has no argument '{argument}'; did you mean"):
            pipe.complete(REQUEST | CONTROL | {argument: INPAINT[argument]})


MISFITS = {
    "controlnet_image holds 1 images for 2 ControlNets; give one for each": (2, CONTROL),
    "controlnet_mode is None, but this ControlNet reads 3 kinds of images": (1, CONTROL),
    "controlnet_mode is 3, but this .* set it to the number .*, 0 to 2": (1, CONTROL | {"controlnet_mode": 3}),
    "controlnet_mode has 1 numbers for 2 controlnet_image": (1, TWO_IMAGES | {"controlnet_mode": [0]}),
    "controlnet_mode is 1, but this ControlNet reads one kind of images; leave": (0, CONTROL | {"controlnet_mode": 1}),
}


@pytest.mark.parametrize("message", tiny.mostly_slow(MISFITS, *list(MISFITS)[:2]))
def test_images_and_modes_that_flux1s_controlnets_cannot_read_are_named(message):
    count, inputs = MISFITS[message]
    networks = [flux1.controlnet(num_mode=3)] * count or [flux1.controlnet()]  # none: one for one kind of images
    with pytest.raises(ValueError, match=message):
        controlled("flux1", *networks).prepare([REQUEST | inputs])


OTHERS = {
    "controlnet has num_attention_heads 2, but dit has 4": ("flux1", [{"num_attention_heads": 2}]),
    "controlnet reads the pixels of images": ("flux1", [{"conditioning_embedding_channels": 4}]),
    "controlnet_2 has pooled_projection_dim 24, but dit has 40": ("sd3", [{}, {"pooled_projection_dim": 24}]),
}


@pytest.mark.parametrize("message", tiny.mostly_slow(OTHERS, list(OTHERS)[0]))
def test_controlnets_that_do_not_fit_the_transformer_are_refused_before_weights_are_read(message, no_weights_are_read):
    name, changes = OTHERS[message]
    networks = [{"flux1": flux1, "sd3": sd3}[name].controlnet(**change) for change in changes]
    with pytest.raises(ValueError, match=message):
        controlled(name, *networks).load_models()


@pytest.mark.slow
def test_a_controlnet_of_flux1_that_is_to_inpaint_is_not_begun():
    with pytest.raises(ValueError, match="inpaint=true, but ControlNets of FLUX.1 read no mask"):
        start_controlnet(lambda device: controlled("flux1"), inpaint=True)


@pytest.mark.slow
def test_nothing_is_added_to_the_tokens_of_edit_images():
    pipe = controlled("flux1", flux1.controlnet())
    pipe.load_models()
    edit = REQUEST | {"edit_image": image(7, (64, 64)), "edit_image_pixels": 64 * 64, "num_inference_steps": 1}
    seen = {}
    pipe.dit.register_forward_pre_hook(lambda _, __, given: seen.update(given), with_kwargs=True)
    sampled(pipe, edit | CONTROL)
    for sample in (*seen["controlnet_block_samples"], *seen["controlnet_single_block_samples"]):
        assert sample.shape[1] == seen["hidden_states"].shape[1]
        assert sample[:, :6].all() and not sample[:, 6:].any()


def test_transparent_images_to_inpaint_are_on_white_as_all_others():
    pipe, sizes = loaded(z_image.controlnet(33)), {"height": SIZE[1], "width": SIZE[0]}
    unit = next(unit for unit in pipe.units if isinstance(unit, ControlEmbedder))
    see_through = Image.new("RGBA", SIZE, (0, 0, 0, 0))
    found, expected = (
        unit.process(
            pipe, CONTROL["controlnet_image"], picture, mask(), **sizes, tiled=False, tile_size=8, tile_stride=4
        )
        for picture in (see_through, Image.new("RGB", SIZE, "white"))
    )
    assert torch.equal(*(latents["control_latents"][0] for latents in (found, expected)))


def test_images_among_options_are_files(tmp_path):
    image(3, SIZE).save(tmp_path / "a.png")
    found = with_images(pipeline(), {"controlnet_image": [str(tmp_path / "a.png")], "cfg_scale": 2.0})
    assert found["controlnet_image"][0].size == SIZE and found["cfg_scale"] == 2.0
    with pytest.raises(ValueError, match="options.edit_image=nothing.png: .*nothing.png"):
        with_images(pipeline(), {"edit_image": "nothing.png"})


@pytest.mark.slow
def test_generate_samples_with_two_controlnets_and_notes_their_images(tmp_path):
    files = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for number, file in enumerate(files):
        image(number, SIZE).save(file)
    second = ["+model@model.controlnet_2=_network", f"model.controlnet_2.path={z_image.controlnet()}"]
    options = [f"+options.controlnet_image=[{','.join(files)}]", "+options.controlnet_end=[1,0.5]"]
    small = ["options.num_inference_steps=1", "options.height=32", "options.width=32", "device=cpu"]
    cfg = tiny.compose("generate", *FAMILY.overrides, *second, *options, *small, f"output={tmp_path}/out")
    (path,) = tiny.call("generate", cfg)
    kept = json.loads(Image.open(path).text["parameters"])
    assert kept["controlnet_image"] == files and kept["controlnet_end"] == [1, 0.5]
