"""ControlNets of every family: what diffusers samples with them, how they begin, when they act, what is refused."""

from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from families import FAMILIES
from miniatures import qwen_image, z_image
from PIL import Image
from safetensors.torch import load_file
from test_family_contract import GUIDED, REQUEST, image, sampled, samples
from torch.testing import assert_close

from controlnet import controlnet as start_controlnet
from diffsynth.core.loader import ModelConfig
from diffsynth.diffusion.loss import FlowMatchSFT
from diffsynth.diffusion.pipeline.generation import with_images
from diffsynth.pipelines.qwen_image import QwenImagePipeline
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
    parts = {name: ModelConfig(path=str((base or z_image.base()) / part)) for name, part in z_image.PARTS.items()}
    control = ModelConfig(path=str(controlnet or z_image.controlnet()))
    pipe = ZImagePipeline.from_components(**parts, controlnet=control, torch_dtype="float32")
    pipe.progress_bar = iter
    return pipe


def qwen_pipeline(controlnet: Path) -> QwenImagePipeline:
    parts = {name: ModelConfig(path=str(tiny.model() / part)) for name, part in tiny.COMPONENTS.items()}
    control = ModelConfig(path=str(controlnet))
    pipe = QwenImagePipeline.from_components(**parts, controlnet=control, torch_dtype="float32")
    pipe.progress_bar = iter
    return pipe


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
    pipe = qwen_pipeline(qwen_image.controlnet(qwen_image.INPAINT_CHANNELS))
    pipe.load_models()
    shared, posi, nega = pipe.prepare([request])
    with torch.no_grad():
        found = pipe.denoise(shared, posi, nega)
    assert_close(found, qwen_image.sampled_by_diffusers([request], shared["noise"]), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_qwen_images_controlnet_begins_as_copies_of_the_first_blocks(tmp_path):
    folder = start_controlnet(
        lambda device: qwen_pipeline(qwen_image.controlnet()), blocks=2, output=str(tmp_path / "new")
    )
    base, own = (load_file(next(path.glob("*.safetensors"))) for path in (tiny.model() / "transformer", folder))
    shared = own.keys() & base.keys()
    assert own.keys() - shared == {key for key in own if key.startswith("controlnet_")}
    assert all(torch.equal(own[key], base[key]) for key in shared)
    assert not any(own[key].any() for key in own.keys() - shared)


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
    base, own = (load_file(next(path.glob("*.safetensors"))) for path in (z_image.base() / "transformer", folder))
    for number, place in enumerate((0, 2, 4)):
        key = "attention.to_q.weight"
        assert torch.equal(own[f"control_layers.{number}.{key}"], base[f"layers.{place}.{key}"])
    assert diffusers.ZImageControlNetModel.from_pretrained(folder).config.control_in_dim == (33 if inpaint else 16)
    control = CONTROL | (INPAINT if inpaint else {})
    pipe = loaded(folder)
    assert_close(sampled(pipe, REQUEST | control), sampled(pipe, REQUEST), atol=1e-6, rtol=0)


def test_training_a_controlnet_leaves_the_base_as_it_is():
    module = FAMILY.module(FAMILY.task("controlnet")).load()
    assert all(name.startswith("pipe.controlnet.") for name, p in module.named_parameters() if p.requires_grad)
    module(samples(FAMILY)).mean().backward()
    without = [name for name, p in module.pipe.controlnet.named_parameters() if p.grad is None]
    assert without == []
    exported = module.export_weights()["controlnet"][0]
    assert exported.keys() == diffusers.ZImageControlNetModel.from_pretrained(z_image.controlnet()).state_dict().keys()


@pytest.mark.parametrize(
    "change, message",
    [
        (INPAINT, "this ControlNet reads 16 channels"),
        ({"controlnet_image": "a.png"}, "controlnet_image is or holds 'a.png', expected images"),
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
        ({"controlnet_image": None}, "controlnet_inpaint_mask is given without controlnet_image"),
        ({"controlnet_inpaint_mask": mask((64, 64))}, "is 64 x 64 pixels, but controlnet_inpaint_image is 32 x 48"),
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


def test_a_controlnet_of_another_base_is_refused_before_weights_are_read():
    with pytest.raises(ValueError, match="Z-Image-Omni takes no ControlNet"):
        pipeline(base=z_image.omni())


def test_images_among_options_are_files(tmp_path):
    image(3, SIZE).save(tmp_path / "a.png")
    found = with_images(pipeline(), {"controlnet_image": [str(tmp_path / "a.png")], "cfg_scale": 2.0})
    assert found["controlnet_image"][0].size == SIZE and found["cfg_scale"] == 2.0
    with pytest.raises(ValueError, match="options.edit_image=nothing.png: .*nothing.png"):
        with_images(pipeline(), {"edit_image": "nothing.png"})
