"""Wan in miniature with random weights, and what diffusers samples with them."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from miniatures.z_image import loaded
from tiny import kept_folder
from tiny_flux2 import randomise
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from diffsynth.pipelines.wan import wan_sigmas
from models.emoji.build import VOCABULARY, train_tokenizer

TEXT_WIDTH, MAX_TOKENS = 32, 24


@cache
def text_to_video() -> Path:
    """The folder of a model repository like Wan 2.1's; written once per session."""
    return write(kept_folder() / "wan", WanPipeline, transformer=transformer())


@cache
def experts() -> Path:
    """The folder of a model repository like Wan 2.2 A14B's; written once per session."""
    networks = {"transformer": transformer(), "transformer_2": transformer(), "boundary_ratio": 0.875}
    return write(kept_folder() / "wan22", WanPipeline, **networks)


def write(root: Path, kind: type[diffusers.DiffusionPipeline], **networks: torch.nn.Module | None) -> Path:
    """Write a model repository of a pipeline's class with random weights."""
    tokenizer = train_tokenizer([], ["<|endoftext|>"])
    torch.manual_seed(0)
    parts = {"vae": vae(), "text_encoder": text_encoder(), **networks}
    kind(tokenizer=tokenizer, scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0), **parts).save_pretrained(root)
    for name in ("transformer", "transformer_2"):
        if parts.get(name) is not None:
            randomise(parts[name], root / name)
    return root


def transformer(**sizes: int) -> WanTransformer3DModel:
    small = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 96, "num_layers": 2, "freq_dim": 32}
    return WanTransformer3DModel(**small | {"text_dim": TEXT_WIDTH} | sizes)


def text_encoder() -> UMT5EncoderModel:
    sizes = {"d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return UMT5EncoderModel(UMT5Config(vocab_size=VOCABULARY, dropout_rate=0.0, **sizes))


def vae() -> AutoencoderKLWan:
    """Of the released factors: 8 × 8 pixels and, after the first, 4 frames."""
    return AutoencoderKLWan(base_dim=8, num_res_blocks=1)


class GivenSigmas(FlowMatchEulerDiscreteScheduler):
    """Samples at Wan's noise levels, which `WanPipeline` gives no way to pass."""

    sigma_shift = 5.0

    def set_timesteps(self, num_inference_steps: int, device=None) -> None:
        self.register_to_config(shift=1.0)
        self.set_shift(1.0)
        super().set_timesteps(
            sigmas=wan_sigmas(num_inference_steps, sigma_shift=self.sigma_shift).tolist(), device=device
        )


def pipeline(kind: type[diffusers.DiffusionPipeline], folder: Path) -> diffusers.DiffusionPipeline:
    """A pipeline of diffusers that samples at our noise levels."""
    pipe = loaded(kind, folder)
    pipe.scheduler = GivenSigmas.from_config(pipe.scheduler.config)
    return pipe


def sampled_by_diffusers(
    requests: list[Mapping],
    noise: Tensor,
    kind: type = WanPipeline,
    folder: Path | None = None,
    lora: Path | None = None,
    **own,
) -> Tensor:
    """The latents (B, C, T, h, w) that a pipeline of diffusers samples for some requests."""
    first = requests[0]
    pipe = pipeline(kind, folder or text_to_video())
    if lora is not None:
        pipe.load_lora_weights(str(lora))
    return pipe(
        prompt=[request["prompt"] for request in requests],
        negative_prompt=[request["negative_prompt"] for request in requests],
        **{name: first[name] for name in ("height", "width", "num_inference_steps")},
        num_frames=1 + 4 * (noise.shape[2] - 1),
        guidance_scale=first["cfg_scale"],
        latents=noise,
        output_type="latent",
        return_dict=False,
        **{"max_sequence_length": MAX_TOKENS} | own,
    )[0]


def sampled_by_experts(requests: list[Mapping], noise: Tensor) -> Tensor:
    """The latents (B, C, T, h, w) that Wan 2.2's two experts sample."""
    return sampled_by_diffusers(requests, noise, folder=experts(), guidance_scale_2=requests[0].get("cfg_scale_2"))
