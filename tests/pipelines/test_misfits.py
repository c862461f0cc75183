"""Networks of different models, and requests that a model cannot follow: both are refused before weights are read."""

import pytest
import tiny
from families import FAMILIES, Family, of_families
from miniatures.requests import REQUEST, image

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
