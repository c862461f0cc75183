"""Stable Diffusion 3.5 in miniature with random weights, as medium is built; what diffusers samples with it."""

import shutil
from functools import cache
from pathlib import Path

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3ControlNetModel, SD3Transformer2DModel
from miniatures.autoencoders import encoding_to_means
from tiny import kept_folder
from tiny_flux2 import randomise
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel
from transformers import T5TokenizerFast as T5Tokenizer

from diffsynth.pipelines.prompts.sd3 import ENCODERS
from models.emoji_z_image.build import vae

PARTS = {"dit": "transformer", "vae": "vae"} | {name: name for pair in ENCODERS.items() for name in pair}
WIDTHS = {"text_encoder": 16, "text_encoder_2": 24}  # of CLIP-L and CLIP-bigG
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
POSITIONS = 77
T5_TOKENS = 24


@cache
def medium() -> Path:
    """The folder of a model repository like that of 3.5 medium; written once per session."""
    folder = kept_folder() / "sd3"
    torch.manual_seed(0)
    randomise(transformer(), folder / "transformer")
    for name, width in WIDTHS.items():
        clip_tokenizer(pad=SPECIAL[1] if name == "text_encoder" else "!").save_pretrained(folder / ENCODERS[name])
        randomise(clip(width), folder / name)
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz,"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁red", -1.0), *letters]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder / "tokenizer_3")
    sizes = {"d_model": 64, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    randomise(T5EncoderModel(T5Config(vocab_size=len(pieces), dropout_rate=0.0, **sizes)), folder / "text_encoder_3")
    autoencoder = vae()
    autoencoder.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
    autoencoder.save_pretrained(folder / "vae")
    return folder


@cache
def controlled() -> Path:
    """The folder of `medium()`, with a ControlNet; written once per session."""
    folder = kept_folder() / "sd3_controlled"
    shutil.copytree(medium(), folder)
    shutil.copytree(controlnet(), folder / "controlnet")
    return folder


@cache
def controlnet(**changes) -> Path:
    """The folder of a ControlNet for `medium()` with random weights; written once each."""
    folder = kept_folder() / "_".join(["sd3_controlnet", *map(str, sum(changes.items(), ()))])
    torch.manual_seed(0)
    config = {name: value for name, value in transformer().config.items() if not name.startswith("_")}
    randomise(SD3ControlNetModel(**config | changes), folder)
    return folder


def transformer(**changes) -> SD3Transformer2DModel:
    sizes = {"num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 4, "caption_projection_dim": 64}
    text = {"joint_attention_dim": 64, "pooled_projection_dim": sum(WIDTHS.values())}
    blocks = {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
    return SD3Transformer2DModel(**{"sample_size": 8, "pos_embed_max_size": 16, **sizes, **text, **blocks, **changes})


def clip(width: int) -> CLIPTextModelWithProjection:
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    # With 2 as the end of the text, transformers pools the token of the highest number, as in the released models.
    tokens = {"vocab_size": 520, "max_position_embeddings": POSITIONS, "bos_token_id": 512, "eos_token_id": 2}
    return CLIPTextModelWithProjection(CLIPTextConfig(**sizes, **tokens, projection_dim=width))


def clip_tokenizer(pad: str) -> CLIPTokenizer:
    """One whose tokens are letters; the end of the text has the highest number, as in the released ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), *SPECIAL]
    tokens = {token: number for number, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=tokens, merges=[], pad_token=pad, model_max_length=POSITIONS)


def sampled_by_diffusers(requests: list[dict], noise: Tensor, lora: Path | None = None, **absent: None) -> Tensor:
    """The latents (B, 16, h, w) that StableDiffusion3Pipeline, or that of ControlNets, samples for some requests."""
    if "controlnet_image" in requests[0]:
        return sampled_with_control(requests, noise)
    pipe = loaded(**absent)
    if lora is not None:
        pipe.load_lora_weights(str(lora))
    return pipe(**arguments(requests, noise))[0]


def arguments(requests: list[dict], noise: Tensor) -> dict:
    """Our requests as arguments of diffusers' pipelines."""
    first = requests[0]
    options = {"prompt": [r["prompt"] for r in requests], "negative_prompt": [r["negative_prompt"] for r in requests]}
    options |= {name: first[name] for name in ("height", "width", "num_inference_steps")}
    options |= {"max_sequence_length": T5_TOKENS, "guidance_scale": first["cfg_scale"], "latents": noise}
    return options | {"output_type": "latent", "return_dict": False}


def sampled_with_control(requests: list[dict], noise: Tensor, *networks: Path) -> Tensor:
    """The latents (B, 16, h, w) that diffusers samples for requests, with one ControlNet or several."""
    first, kind = requests[0], diffusers.StableDiffusion3ControlNetPipeline
    controlnets = [SD3ControlNetModel.from_pretrained(network) for network in networks or [controlnet()]]
    options = {"control_image": first["controlnet_image"], "controlnet_conditioning_scale": first["controlnet_scale"]}
    options |= {
        f"control_guidance_{end}": first.get(f"controlnet_{end}", value) for end, value in (("start", 0), ("end", 1))
    }
    if "controlnet_inpaint_mask" in first:
        kind = diffusers.StableDiffusion3ControlNetInpaintingPipeline
        options["control_mask"] = first["controlnet_inpaint_mask"]
    pipe = loaded(kind, controlnet=controlnets if len(controlnets) > 1 else controlnets[0])
    with encoding_to_means():
        return pipe(**arguments(requests, noise), **options)[0]


def loaded(
    kind: type[diffusers.DiffusionPipeline] = diffusers.StableDiffusion3Pipeline, **parts
) -> diffusers.DiffusionPipeline:
    """A pipeline of diffusers with the miniature's networks, and the scheduler of the released ones."""
    folder, kinds = medium(), {"text_encoder_3": T5EncoderModel, "tokenizer_3": T5Tokenizer}
    kinds |= dict.fromkeys(WIDTHS, CLIPTextModelWithProjection) | dict.fromkeys(
        ("tokenizer", "tokenizer_2"), CLIPTokenizer
    )
    built = {name: part.from_pretrained(folder / name) for name, part in kinds.items()}
    built["transformer"] = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    built["vae"] = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    built["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = kind(**built | parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
