"""Wan's weights in the layout of its authors, and LoRA files under the names of every program."""

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from miniatures import wan, wan_image, wan_original

from diffsynth.core.loader import ModelConfig, load_state_dict
from diffsynth.diffusion.pipeline.architectures import architectures
from diffsynth.pipelines.layouts import wan as layouts
from diffsynth.pipelines.wan import WanPipeline
from diffsynth.pipelines.wan_image_to_video import WanImageToVideoPipeline


def vae(**sizes) -> AutoencoderKLWan:
    return AutoencoderKLWan(base_dim=4, num_res_blocks=2, **sizes)


def vae_22() -> AutoencoderKLWan:
    form = {"is_residual": True, "patch_size": 2, "scale_factor_spatial": 16, "in_channels": 12, "out_channels": 12}
    return vae(**form, z_dim=48, decoder_base_dim=8, latents_mean=[0.0] * 48, latents_std=[1.0] * 48)


NETWORKS = {
    "text to video": (wan.transformer, wan_original.transformer),
    "image to video": (wan_image.with_clip, wan_original.transformer),
    "first and last frame": (lambda: wan_image.with_clip(pos_embed_seq_len=10), wan_original.transformer),
    "vae 2.1": (vae, wan_original.vae_21),
    "vae 2.2": (vae_22, wan_original.vae_22),
    "umt5": (wan.text_encoder, wan_original.umt5),
    "clip": (wan_image.clip_vision, wan_original.clip),
}


def original(name, folder):
    """A network with random weights, its file with the original's names, and the folder of its config.json."""
    make, turned = NETWORKS[name]
    torch.manual_seed(0)
    network = make().eval()
    for parameter in network.parameters():
        parameter.data = torch.randn_like(parameter)
    network.save_pretrained(folder / "released")
    state = turned(network.state_dict())
    return network, wan_original.written(state, folder / "own" / "model.safetensors"), folder / "released"


def read(file, config, storage=None):
    pipe = WanImageToVideoPipeline(torch_dtype=torch.float32)
    pipe.dit_channels, pipe.latents = (16, 36, 48), pipe.latents
    pipe.check_networks = lambda: None
    pipe.build_models([ModelConfig(path=str(file), config=str(config))])
    pipe.load_models()
    ((name, module),) = [(name, module) for name, module in pipe.named_children()]
    return pipe, name, module


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_under_the_originals_names_are_those_of_the_library(name, tmp_path):
    network, file, config = original(name, tmp_path)
    pipe, component, module = read(file, config)
    expected, found = network.state_dict(), module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
