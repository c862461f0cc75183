"""FLUX.1 and Chroma in miniature with random weights, and what diffusers samples with them."""

import inspect
import shutil
import string
from functools import cache
from pathlib import Path

import diffusers
import torch
from diffusers import ChromaTransformer2DModel, FluxControlNetModel, FluxTransformer2DModel
from miniatures.autoencoders import encoding_to_means
from PIL import Image
from tiny import kept_folder
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from models.emoji_z_image.build import vae

PARTS = {"dit": "transformer"} | {
    name: name for name in ("text_encoder", "text_encoder_2", "vae", "tokenizer", "tokenizer_2")
}
CHROMA_PARTS = {name: part for name, part in PARTS.items() if name not in ("text_encoder_2", "tokenizer_2")}
WORDS = ("a", "an", "red", "line", "emoji", "of", "apple", "tiger", "face", "looking", "at", "umbrella", "very", "long")
MAX_TOKENS = 24
CLIP_WIDTH, T5_WIDTH = 24, 32
SIZES = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": T5_WIDTH,
    "axes_dims_rope": (4, 6, 6),
}


@cache
def dev(**changes) -> Path:
    """The folder of a model repository like FLUX.1-dev's, or with another transformer; written once per session."""
    folder = kept_folder() / "_".join(["flux1", *changes])
    torch.manual_seed(0)
    options = SIZES | {"pooled_projection_dim": CLIP_WIDTH, "guidance_embeds": True} | changes
    randomise(FluxTransformer2DModel(**options), folder / "transformer")
    randomise(clip(), folder / "text_encoder")
    randomise(t5(), folder / "text_encoder_2")
    randomise(autoencoder(), folder / "vae")
    characters = [letter + end for letter in string.printable for end in ("", "</w>")]
    vocabulary = {token: number for number, token in enumerate(["<|startoftext|>", "<|endoftext|>", *characters])}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder / "tokenizer")
    words().save_pretrained(folder / "tokenizer_2")
    return folder


def schnell() -> Path:
    return dev(guidance_embeds=False)


def fill() -> Path:
    return dev(in_channels=384, out_channels=64)


@cache
def controlled() -> Path:
    """The folder of `dev()`, with a ControlNet; written once per session."""
    folder = kept_folder() / "flux1_controlled"
    shutil.copytree(dev(), folder)
    shutil.copytree(controlnet(), folder / "controlnet")
    return folder


@cache
def controlnet(**changes) -> Path:
    """The folder of a ControlNet for `dev()` with random weights; written once each."""
    folder = kept_folder() / "_".join(["flux1_controlnet", *map(str, sum(changes.items(), ()))])
    torch.manual_seed(0)
    options = SIZES | {"pooled_projection_dim": CLIP_WIDTH, "guidance_embeds": True, "num_single_layers": 1} | changes
    randomise(FluxControlNetModel(**options), folder)
    return folder


@cache
def chroma() -> Path:
    """The folder of a model repository like Chroma's; written once per session."""
    folder = kept_folder() / "chroma"
    torch.manual_seed(0)
    sizes = {"approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 2}
    randomise(ChromaTransformer2DModel(**SIZES, **sizes), folder / "transformer")
    randomise(t5(), folder / "text_encoder")
    randomise(autoencoder(), folder / "vae")
    words().save_pretrained(folder / "tokenizer")
    return folder


def clip() -> CLIPTextModel:
    sizes = {"hidden_size": CLIP_WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=202, eos_token_id=1, bos_token_id=0, pad_token_id=1, **sizes))


def t5() -> T5EncoderModel:
    sizes = {"d_model": T5_WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(T5Config(vocab_size=256, feed_forward_proj="gated-gelu", dropout_rate=0.0, **sizes))


def autoencoder() -> diffusers.AutoencoderKL:
    model = vae()
    model.register_to_config(shift_factor=0.1159, scaling_factor=0.3611)
    return model


def words() -> T5Tokenizer:
    """T5's tokenizer with a token for each word of the tests' prompts, and for each letter."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    known = [(f"▁{word}", -1.0) for word in WORDS] + [(letter, -9.0) for letter in ("▁", *string.ascii_lowercase, ",")]
    return T5Tokenizer(vocab=special + known)


def randomise(model: torch.nn.Module, folder: Path) -> None:
    """Add noise to all weights, so that every parameter changes the output."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)


def sampled_by_diffusers(requests: list[dict], noise: Tensor, lora: Path | None = None) -> Tensor:
    """The latents (B, 16, h, w) that FluxPipeline, or that of Kontext or of ControlNets, samples for requests."""
    first = requests[0]
    if "controlnet_image" in first:
        return sampled_with_control(requests, noise)
    options = {"true_cfg_scale": first["cfg_scale"], "guidance_scale": first.get("embedded_guidance", 3.5)}
    pipe = pipeline(KontextOfSeveral if "edit_image" in first else diffusers.FluxPipeline, dev())
    if "edit_image" in first:
        pipe.pictures = first["edit_image"]
        options["max_area"] = first["height"] * first["width"]  # else it samples at a megapixel
    return sampled(pipe, requests, noise, lora, **options)


def sampled_with_control(requests: list[dict], noise: Tensor, *networks: Path) -> Tensor:
    """The latents (B, 16, h, w) that FluxControlNetPipeline samples for requests, with one network or several."""
    first = requests[0]
    loaded = [FluxControlNetModel.from_pretrained(network) for network in networks or [controlnet()]]
    several = len(loaded) > 1 or isinstance(first["controlnet_image"], list)
    options = {"true_cfg_scale": first["cfg_scale"], "guidance_scale": 3.5, "control_image": first["controlnet_image"]}
    options |= {
        "controlnet_conditioning_scale": first["controlnet_scale"],
        "control_mode": first.get("controlnet_mode"),
    }
    options |= {
        f"control_guidance_{end}": first.get(f"controlnet_{end}", value) for end, value in (("start", 0), ("end", 1))
    }
    kind = diffusers.FluxControlNetPipeline
    if "inpaint_mask" in first:
        kind = diffusers.FluxControlNetInpaintPipeline
        options |= {"image": first["input_image"], "mask_image": first["inpaint_mask"], "strength": 1.0}
        options |= {"latents": noise}  # it packs them itself
        options.pop("true_cfg_scale")
    pipe = pipeline(kind, dev(), controlnet=loaded if several else loaded[0])
    with encoding_to_means():
        return sampled(pipe, requests, noise, **options)


def sampled_by_chroma(requests: list[dict], noise: Tensor, lora: Path | None = None) -> Tensor:
    """The latents (B, 16, h, w) that ChromaPipeline samples for some requests."""
    return sampled(pipeline(MaskedChroma, chroma()), requests, noise, lora, guidance_scale=requests[0]["cfg_scale"])


def sampled_by_fill(requests: list[dict], noise: Tensor) -> Tensor:
    """The latents (B, 16, h, w) that FluxFillPipeline samples for requests of one image and mask."""
    first = requests[0]
    options = {"image": first["input_image"], "mask_image": first["inpaint_mask"], "guidance_scale": 30.0}
    with encoding_to_means():
        return sampled(pipeline(diffusers.FluxFillPipeline, fill()), requests, noise, **options)


class KontextOfSeveral(diffusers.FluxKontextPipeline):
    """diffusers' pipeline, which takes one image to edit, with several, each placed as that one."""

    pictures: list[Image.Image]

    def prepare_latents(self, image, *arguments):
        pictures = [self.image_processor.preprocess(picture) for picture in self.pictures]
        each = [super(KontextOfSeveral, self).prepare_latents(picture, *arguments) for picture in pictures]
        noisy, references, ids, places = zip(*each, strict=True)
        return noisy[0], torch.cat(references, dim=1), ids[0], torch.cat(places)


class MaskedChroma(diffusers.ChromaPipeline):
    """diffusers' pipeline with masks that mask: it adds numbers to attention (diffusers#12116)."""

    def _prepare_attention_mask(self, *arguments, attention_mask, **options):
        mask = None if attention_mask is None else attention_mask.bool()
        return super()._prepare_attention_mask(*arguments, attention_mask=mask, **options)


def pipeline(kind: type[diffusers.DiffusionPipeline], folder: Path, **parts) -> diffusers.DiffusionPipeline:
    """A pipeline of diffusers with the weights of a folder in fp32."""
    classes = {"transformer": FluxTransformer2DModel, "text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
    if folder == chroma():
        classes = {"transformer": ChromaTransformer2DModel, "text_encoder": T5EncoderModel}
    classes |= {"vae": diffusers.AutoencoderKL, "tokenizer": AutoTokenizer, "tokenizer_2": AutoTokenizer}
    built = {name: kind.from_pretrained(folder / name) for name, kind in classes.items() if (folder / name).exists()}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = kind(scheduler=scheduler, **built, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(
    pipe: diffusers.DiffusionPipeline, requests: list[dict], noise: Tensor, lora: Path | None = None, **options
) -> Tensor:
    first = requests[0]
    if lora is not None:
        pipe.load_lora_weights(lora)
    sizes = {name: first[name] for name in ("height", "width", "num_inference_steps")}
    options |= {"prompt": [r["prompt"] for r in requests], "max_sequence_length": MAX_TOKENS}
    if "negative_prompt" in inspect.signature(pipe.__call__).parameters:
        options |= {"negative_prompt": [r["negative_prompt"] for r in requests]}
    options = {"latents": pipe._pack_latents(noise, *noise.shape), **options}
    found = pipe(**options, **sizes, output_type="latent", return_dict=False)[0]
    return pipe._unpack_latents(found, first["height"], first["width"], pipe.vae_scale_factor)
