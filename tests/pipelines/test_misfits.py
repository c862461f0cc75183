"""Networks of different models, and requests that a model cannot follow: both are refused before weights are read."""

from dataclasses import replace

import pytest
import released
import tiny
from families import FAMILIES, Family, of_families
from miniatures import flux1, flux3, z_image
from miniatures.requests import REQUEST, image, sampled

BY_NAME = {str(family): family for family in FAMILIES}


# Autoencoders ---------------------------------------------------------------------------------------------------------


@of_families
def test_an_autoencoder_of_other_channels_is_refused(family: Family, no_weights_are_read):
    pipe = family.build()
    name = next(key for key in ("latent_channels", "z_dim") if key in pipe.vae.config)
    pipe.vae.register_to_config(**{name: 5})
    with pytest.raises(ValueError, match=f"vae makes latents of .* channels, but dit reads {pipe.latents.channels}: "):
        pipe.check_networks()


EXCHANGED = {"z_image": (1.5305, 0.0609), "flux1_dev": (1.5305, 0.0609), "sd3_5_medium": (0.3611, 0.1159)}


@pytest.mark.parametrize("name", tiny.mostly_slow(EXCHANGED, "sd3_5_medium"))
def test_statistics_of_another_familys_autoencoder_are_refused(name, no_weights_are_read):
    pipe = BY_NAME[name].build()
    scale, shift = EXCHANGED[name]
    pipe.vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    own = pipe.latents.statistics
    with pytest.raises(ValueError, match=f"vae has scaling_factor {scale} and shift_factor {shift}.* are {own[0]} and"):
        pipe.check_networks()
    pipe.vae.register_to_config(scaling_factor=0.7, shift_factor=shift)
    pipe.check_networks()  # an autoencoder of one's own


# Masks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["emoji", pytest.param("z_image", marks=pytest.mark.slow)])
def test_a_mask_of_another_size_than_its_image_is_refused(name, no_weights_are_read):
    images = {"input_image": image(0, (64, 96)), "inpaint_mask": image(1, (100, 20)).convert("L")}
    with pytest.raises(ValueError, match="inpaint_mask is 100 x 20 pixels and input_image 64 x 96; save both at one"):
        BY_NAME[name].build().complete(REQUEST | images)


# Requests, and transformers of another variant ------------------------------------------------------------------------


def distilled(**settings) -> Family:
    family = BY_NAME["flux3_klein_base"]
    return replace(family, folder=flux3.distilled, settings=family.settings | settings)


def schnell() -> Family:
    return replace(BY_NAME["flux1_dev"], folder=flux1.schnell)


PICTURE = image(3)
LONG = "a red apple " * 90
REFUSED = {
    "cfg_scale is 3.5, but dit is the distilled FLUX.3": (distilled, {}),
    "edit_image holds 11 images; FLUX.3 reads 10 at most": ("flux3_klein_base", {"edit_image": [PICTURE] * 11}),
    "embedded_guidance is 2.0, but dit has no guidance embedding": (schnell, {"embedded_guidance": 2.0}),
    "height x width is 1040 x 32, but the positions of dit end at 1024 x 1024": ("z_image", {"height": 1040}),
    "The prompt has [0-9]+ tokens, but the positions of dit end at 224; .* model.max_sequence_length=224 or less": (
        "z_image",
        {"prompt": LONG},
    ),
    "controlnet_start is 0.7 and controlnet_end 0.5": (
        "z_image_controlnet",
        {"controlnet_image": PICTURE, "controlnet_start": [0.1, 0.7], "controlnet_end": 0.5},
    ),
    "context_image is given beside controlnet_image": (
        "qwen_image_controlnet",
        {"controlnet_image": PICTURE, "context_image": PICTURE},
    ),
}


@pytest.mark.parametrize("message", tiny.mostly_slow(REFUSED, *list(REFUSED)[3:6]))
def test_requests_that_a_model_would_ignore_or_fail_at_are_refused(message, no_weights_are_read):
    family, request = REFUSED[message]
    pipe = (BY_NAME[family] if isinstance(family, str) else family()).build()
    small = {"prompt": "a red apple", "height": 32, "width": 32}
    with pytest.raises(ValueError, match=message):
        pipe.complete(small | request)
    pipe.complete(small | {"cfg_scale": 1.0})


def test_a_prompt_that_fills_all_positions_is_sampled():
    pipe = BY_NAME["z_image"].load()
    words = next(n for n in range(400, 0, -1) if len(pipe.prompt_tokens("tokenizer", "a " * n)) <= 224)
    assert len(pipe.prompt_tokens("tokenizer", "a " * words)) == 224
    request = {"prompt": "a " * words, "height": 1024, "width": 16, "num_inference_steps": 1, "cfg_scale": 1.0}
    assert sampled(pipe, request).isfinite().all()


VARIANTS = {
    "dit reads no features of images, but siglip makes those of width 24": ("z_image_omni", z_image.base),
    "dit is Omni's transformer, .* take model=z_image_omni": ("z_image", z_image.omni),
}


@pytest.mark.parametrize("message", VARIANTS)
def test_the_transformers_of_z_image_and_of_omni_do_not_stand_for_each_other(message, no_weights_are_read):
    name, folder = VARIANTS[message]
    with pytest.raises(ValueError, match=message):
        released.with_part(BY_NAME[name], "dit", folder() / "transformer").build()
