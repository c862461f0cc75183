"""FLUX.3 klein in miniature with random weights, the base and the distilled; what diffusers samples with them."""

from functools import cache
from pathlib import Path

import torch
from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler, Flux3Transformer2DModel
from diffusers.modular_pipelines.flux3 import encoders
from diffusers.modular_pipelines.flux3.modular_blocks_flux3 import Flux3AutoCoreDenoiseStep, Flux3AutoVaeEncoderStep
from diffusers.modular_pipelines.flux3.modular_blocks_flux3_distilled import Flux3DistilledAutoCoreDenoiseStep
from miniatures.autoencoders import give_batch_norm_statistics
from tiny import kept_folder
from tiny_flux2 import randomise
from torch import Tensor
from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from diffsynth.pipelines.flux2_image import Flux2VAE
from models.emoji.build import VOCABULARY, train_tokenizer
from models.emoji_flux2.build import CHAT_TEMPLATE, SPECIAL_TOKENS, vae

WIDTH = 32  # of the text encoder
DEPTHS = tuple(range(1, 9))  # of its 9 layers


@cache
def base() -> Path:
    """The folder of a model repository like that of FLUX.3 klein base; written once per session."""
    return write(kept_folder() / "flux3", flow_map=False)


@cache
def distilled() -> Path:
    """The folder of a model repository like that of FLUX.3 klein; written once per session."""
    return write(kept_folder() / "flux3_distilled", flow_map=True)


def write(folder: Path, flow_map: bool) -> Path:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["user\n", "assistant\n", "\n\n"], SPECIAL_TOKENS)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder / "tokenizer")
    text = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 9}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    config = Qwen3VLConfig(
        text_config={**text, **heads, "rope_scaling": rope}, vision_config=vision | {"deepstack_visual_indexes": [0]}
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder / "text_encoder")
    sizes = {"num_layers": 1, "num_single_layers": 4, "attention_head_dim": 16, "num_attention_heads": 4}
    sizes |= {"joint_attention_dim": 8 * WIDTH, "axes_dims_rope": (4, 4, 4, 4), "flow_map": flow_map}
    randomise(Flux3Transformer2DModel(**sizes), folder / "transformer")
    vae().save_pretrained(folder / "vae")
    give_batch_norm_statistics(folder / "vae")
    return folder


def sampled_by_diffusers(requests: list[dict], noise: Tensor, folder: Path | None = None) -> Tensor:
    """The latents (B, 128, h, w) that the modular blocks of FLUX.3 sample for some requests, one after another."""
    folder = folder or base()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = Qwen3VLForConditionalGeneration.from_pretrained(folder / "text_encoder")
    dit = Flux3Transformer2DModel.from_pretrained(folder / "transformer")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.93)
    tokenizer.tokenizer = tokenizer  # it expects a processor, which holds a tokenizer

    def embedded(prompt: str) -> Tensor:
        step = encoders.Flux3TextEncoderStep
        return step._get_qwen3_vl_prompt_embeds(encoder, tokenizer, prompt, hidden_states_layers=DEPTHS)

    def sampled(request: dict, noise: Tensor) -> Tensor:
        inputs = {"prompt_embeds": embedded(request["prompt"]), "latents": noise}
        inputs |= {name: request[name] for name in ("height", "width", "num_inference_steps")}
        if images := request.get("edit_image"):
            vae_encoder = Flux3AutoVaeEncoderStep().init_pipeline()
            vae_encoder.update_components(vae=library_vae(folder))
            inputs["image_cond_latents"] = vae_encoder(image=images, output="image_cond_latents")
        parts = {"transformer": dit, "scheduler": scheduler}
        if dit.config.flow_map:
            pipe = Flux3DistilledAutoCoreDenoiseStep().init_pipeline()
        else:
            pipe = Flux3AutoCoreDenoiseStep().init_pipeline()
            parts["guider"] = ClassifierFreeGuidance(guidance_scale=request["cfg_scale"])
            inputs["negative_prompt_embeds"] = embedded(request["negative_prompt"])
        pipe.update_components(**parts)
        with torch.no_grad():
            return pipe(**inputs, output="latents")

    with torch.no_grad():
        return torch.cat([sampled(request, latents) for request, latents in zip(requests, noise.split(1), strict=True)])


def library_vae(folder: Path) -> torch.nn.Module:
    return Flux2VAE.__mro__[2].from_pretrained(folder / "vae")
