"""FLUX.3 klein (base, distilled): text-to-image and image-to-image, editing one or several images.

Black Forest Labs 2026, "FLUX.3" (https://bfl.ai). Networks: diffusers, transformers.
Latents are (B, 128, H/16, W/16), as FLUX.2's, and the transformer reads each latent pixel as a token. Edit images
are further tokens. The distilled network is a flow map: it also reads the noise level that a step ends at. Constants
come from the released pipelines (diffusers' modular blocks of FLUX.3) unless a comment says otherwise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import Flux3Transformer2DModel
from PIL import Image
from torch import Tensor

from ..core.gradient import checkpoint_blocks
from ..core.host_memory import sent
from ..core.loader import ModelConfig
from ..core.ranges import NonNegativeFloat, SamplingSteps, Tokens
from ..core.sharing import runs_together
from ..diffusion.adapters.names import LayerNames
from ..diffusion.base_pipeline import BasePipeline
from ..diffusion.flow_match import linear_levels, time_shift
from ..diffusion.pipeline.components import Folder, Network
from ..diffusion.pipeline.image_units import IMAGE_UNITS, image_list
from ..diffusion.pipeline.request import ImageRequest
from ..diffusion.pipeline.units import in_groups
from ..diffusion.pipeline.vae import Latents
from ..diffusion.prompts.embedder import PromptEmbedder
from .autoencoders.flux2 import Flux2VAE
from .edit_images.flux3 import Flux3Unit_EditImageEmbedder
from .shared.flux import embedding_widths, grid_positions, text_embeddings
from .shared.tokens import flatten_latents, unflatten_latents

__all__ = ["Flux3ImagePipeline", "ModelConfig"]

SHIFT = 6.93
MAX_PROMPT_TOKENS = 8192  # including the chat template's
MAX_REFERENCES = 10  # images to edit
PADDING = 80  # prompts are padded to a multiple of so many tokens, and the network attends to the padding
ROPE_SCALE = 0.5  # distance between neighbouring image tokens
TEXT_DEPTHS = 8  # hidden states of the text encoder are read after 1/9, 2/9, …, 8/9 of its layers: 4, 8, …, 32 of 36
# Black Forest Labs' names of the blocks and of their layers.
BLOCKS = {"txt_mode_blocks.*": "txt_mode_blocks.*", "single_blocks.*": "single_transformer_blocks.*"}
BLOCKS |= {f"content_mode_blocks.{kind}.*": f"mode_blocks.{kind}.*" for kind in ("image", "image_cond")}
LAYERS = {"q_proj": "attn.to_q", "k_proj": "attn.to_k", "v_proj": "attn.to_v", "attn_out": "attn.to_out.0"}
LAYERS |= {"mlp_in": "ff.linear_in", "mlp_out": "ff.linear_out"}
LORA_NAMES = LayerNames(
    prefix="transformer",
    original={f"{theirs}.{name}": f"{own}.{layer}" for theirs, own in BLOCKS.items() for name, layer in LAYERS.items()},
)


def flux3_sigmas(num_inference_steps: int, denoising_strength: float = 1.0) -> Tensor:
    """Noise levels (N,) of FLUX.3: linear down to 1 / N, then shifted by a constant factor at every resolution."""
    linear = linear_levels(num_inference_steps, denoising_strength, last=1 / num_inference_steps)
    return time_shift(linear, SHIFT)


def model_fn_flux3(
    dit: Flux3Transformer2DModel,
    latents: Tensor,
    timestep: Tensor,
    prompt_emb: Tensor,
    prompt_emb_lengths: Sequence[Sequence[int]],
    edit_latents: Sequence[Tensor] = (),
    target_timestep: Tensor | None = None,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """Velocity (B, 128, h, w) of noisy latents (B, 128, h, w) at timesteps (B,) in [0, 1000].

    Prompts of one length go through the network together: it has no mask for padding that only the batch needs.

    Args:
        prompt_emb: Text embeddings (B, L, D), right-padded to the longest.
        prompt_emb_lengths: For each sample the number of its own text embeddings.
        edit_latents: Clean latents (B, 128, h', w') of each edit image, of their own sizes.
        target_timestep: Timesteps (B,) in [0, 1000] that the steps end at; only of a flow map.

    Raises:
        ValueError: Prompts differ in length where several devices have to call the network equally often.
    """
    checkpoint_blocks(dit, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    lengths = [sum(own) for own in prompt_emb_lengths]
    if runs_together() and len(set(lengths)) > 1:
        raise ValueError(
            f"The prompts of a batch have {sorted(set(lengths))} tokens; on devices that share weights, FLUX.3 runs "
            "prompts of one length together: set micro_batch_size=1."
        )
    times = {"timestep": timestep, "target_timestep": target_timestep}
    batches = {name: batch for name, batch in times.items() if batch is not None} | {"text": prompt_emb}

    def velocities(samples: Sequence[int]) -> Sequence[Tensor]:
        own = {name: torch.stack([batch[sample] for sample in samples]) for name, batch in batches.items()}
        images = [torch.stack([image[sample] for sample in samples]) for image in (latents, *edit_latents)]
        return velocity(dit, images, own.pop("text")[:, : lengths[samples[0]]], **own)

    return torch.stack(in_groups(range(len(latents)), lengths, velocities))


def velocity(dit: Flux3Transformer2DModel, images: Sequence[Tensor], text: Tensor, **times: Tensor) -> Tensor:
    """Velocity (B, 128, h, w) of the first images (B, 128, h, w), where text embeddings (B, L, D) need no padding."""
    (noisy, *clean), ids = images, {"txt_ids": grid_positions(0, 1, 1, text.shape[1]).float()}
    inputs = {"hidden_states": flatten_latents(noisy).to(dit.dtype), "encoder_hidden_states": text.to(dit.dtype)}
    ids["img_ids"] = scaled_positions(noisy, 0)
    if clean:
        inputs["image_cond_hidden_states"] = torch.cat([flatten_latents(image) for image in clean], dim=1).to(dit.dtype)
        ids["image_cond_ids"] = torch.cat([scaled_positions(image, -1 - n) for n, image in enumerate(clean)])
    inputs |= {name: sent(own, noisy.device) for name, own in ids.items()}
    inputs |= {name: timesteps / 1000 for name, timesteps in times.items()}
    return unflatten_latents(dit(**inputs, return_dict=False)[0], *noisy.shape[2:])


def scaled_positions(latents: Tensor, number: int) -> Tensor:
    """Positions (h · w, 4) of an image's tokens: time 0, scaled row and column, and the image's number."""
    return grid_positions(0, *latents.shape[2:], 1) * ROPE_SCALE + torch.tensor([0, 0, 0, number])


# Units ----------------------------------------------------------------------------------------------------------------


class Flux3Unit_PromptEmbedder(PromptEmbedder):
    """Computes text embeddings (1, L, 8 D) of a prompt in its chat template, padded to a multiple of 80 tokens."""

    def __init__(self):
        super().__init__(counted=True)

    def tokenize(self, pipe, prompt, max_sequence_length):
        texts = [pipe.prompt_text(prompt)]
        length = math.ceil(len(pipe.tokenizer(texts).input_ids[0]) / PADDING) * PADDING
        options = {"padding": "max_length", "padding_side": "right", "truncation": True, "return_tensors": "pt"}
        return pipe.tokenizer(texts, max_length=min(length, max_sequence_length), **options)

    def embed(self, pipe: "Flux3ImagePipeline", tokens: Mapping[str, Tensor]) -> Tensor:
        decoder, mask = pipe.text_encoder.get_decoder(), tokens["attention_mask"]
        # The training gave padding position 1; versions of transformers differ in what they give it.
        own = torch.arange(mask.shape[1], device=mask.device).masked_fill(mask == 0, 1)
        inputs = {"input_ids": tokens["input_ids"], "attention_mask": mask, "position_ids": own}
        return text_embeddings(decoder, TEXT_DEPTHS, **inputs)


# Pipeline -------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Flux3Request(ImageRequest):
    """Sample one image with FLUX.3, from a prompt, or from a prompt and images to edit.

    Args:
        edit_image: Image that is changed as the prompt says, or several that the prompt refers to.
        edit_image_auto_resize: Shrink a single edit image to 4 megapixels and pad it, or several to 1 megapixel each
            and crop them; if false, their sides must be multiples of 16.
        max_sequence_length: Tokens that the prompt is truncated to, including the chat template's.
    """

    num_inference_steps: SamplingSteps = 50
    cfg_scale: NonNegativeFloat = 3.5
    edit_image: Image.Image | Sequence[Image.Image] | None = None
    edit_image_auto_resize: bool = True
    max_sequence_length: Tokens = MAX_PROMPT_TOKENS


class Flux3ImagePipeline(BasePipeline):
    """FLUX.3 klein on diffusers' transformer, FLUX.2's VAE and transformers' Qwen3-VL."""

    request = Flux3Request
    components = {
        "dit": Network("Flux3Transformer2DModel", lora=LORA_NAMES),
        "text_encoder": Network("Qwen3VLForConditionalGeneration", lora="text_encoder"),
        "vae": Network(Flux2VAE),
        "tokenizer": Folder("AutoTokenizer", needed_by="text_encoder"),
    }
    latents = Latents(channels=128, factor=16)
    model_fn = staticmethod(model_fn_flux3)
    sigma_grid = staticmethod(flux3_sigmas)
    model_settings = ("max_sequence_length",)
    text_widths = {"text_encoder": partial(embedding_widths, count=TEXT_DEPTHS)}
    unit_classes = (
        *IMAGE_UNITS,
        Flux3Unit_EditImageEmbedder,
        Flux3Unit_PromptEmbedder,
    )

    def complete(self, request: Mapping) -> dict:
        whole = super().complete(request)
        if self.dit is not None and self.dit.config.flow_map and whole["sampler"] != "euler":
            raise ValueError(
                f"sampler is {whole['sampler']!r}, but the distilled FLUX.3 reads where an Euler step ends; "
                "set sampler=euler."
            )
        if self.dit is not None and self.dit.config.flow_map and whole["cfg_scale"] != 1:
            raise ValueError(
                f"cfg_scale is {whole['cfg_scale']}, but dit is the distilled FLUX.3, which is sampled without "
                "guidance; set cfg_scale=1 as model=flux3_klein does, or take the transformer of the base."
            )
        references = len(image_list(whole["edit_image"], "edit_image"))
        if references > MAX_REFERENCES:
            raise ValueError(f"edit_image holds {references} images; FLUX.3 reads {MAX_REFERENCES} at most.")
        return whole

    def predict(self, timestep: Tensor, **inputs) -> Tensor:
        """Velocity (B, …) at timesteps (B,); a flow map predicts that of a step to the next level of the grid.

        Training sets the target level to the current level, where a flow map equals the flow's velocity.
        """
        if not self.network.config.flow_map:
            return super().predict(timestep, **inputs)
        levels = self.scheduler.timesteps.to(timestep.device)
        nearest = (levels - timestep.float().unsqueeze(-1)).abs().argmin(-1)
        ends = torch.cat([levels[1:], levels.new_zeros(1)])[nearest]
        return super().predict(timestep, target_timestep=timestep if self.scheduler.training else ends, **inputs)

    def prompt_text(self, prompt: str) -> str:
        """The prompt as a question in the chat template, with the beginning of an answer."""
        question = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
