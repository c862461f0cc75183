"""Transformers of families whose attention reads further keys, with random weights, and inputs for them."""

from pathlib import Path

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from diffsynth.core.loader.model_config import ModelConfig
from diffsynth.diffusion.pipeline import kv_cache
from diffsynth.pipelines import flux1_image, flux2_image, qwen_image, wan
from diffsynth.pipelines.flux1_image import Flux1ImagePipeline
from diffsynth.pipelines.flux2_image import Flux2ImagePipeline
from diffsynth.pipelines.networks import flux2 as flux2_network
from diffsynth.pipelines.networks import qwen_image as qwen_image_network
from diffsynth.pipelines.qwen_image import QwenImagePipeline
from diffsynth.pipelines.shared import flux1 as flux1_network
from diffsynth.pipelines.wan import Wan22TI2VPipeline, WanPipeline

LENGTH = 5  # of further keys


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Base:
    """Qwen-Image's transformer with random weights, and its prediction for a batch of three samples."""

    module, pipeline, latents = qwen_image, QwenImagePipeline, (3, 16, 4, 8)
    stock = {"block": qwen_image_network.QwenDoubleStreamAttnProcessor2_0}
    padded = [[9], [2], [5]]  # lengths of the prompts
    unread = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")  # in the last block

    def __init__(self, dit):
        self.dit = dit
        self.batch = {
            "latents": some(*self.latents),
            "timestep": torch.tensor([100.0, 400.0, 800.0]),
            "prompt_emb": some(3, 9, self.dit.config.joint_attention_dim, seed=1),
            "prompt_emb_mask": torch.arange(9) < torch.tensor(self.padded),
        }

    def __call__(self, rows=slice(None), **inputs) -> Tensor:
        given = {name: tensor[rows] for name, tensor in self.batch.items()}
        if len(given["latents"]) == 1:  # a single sample has no padding
            given["prompt_emb"] = given["prompt_emb"][:, given["prompt_emb_mask"][0]]
            given["prompt_emb_mask"] = given["prompt_emb_mask"][:, given["prompt_emb_mask"][0]]
        return self.predict(**given, **inputs)

    def predict(self, **inputs) -> Tensor:
        return qwen_image.model_fn_qwen_image(self.dit, **inputs)

    def blocks(self) -> dict[str, nn.Module]:
        return {f"block_{number}": block for number, block in enumerate(self.dit.transformer_blocks)}

    def cache(self, batch: int = 3, length: int = LENGTH) -> dict[str, tuple[Tensor, Tensor]]:
        shapes = {block: (batch, length, *heads) for block, heads in kv_cache.blocks_of(self.dit).items()}
        return {block: (some(*shape, seed=2), some(*shape, seed=3)) for block, shape in shapes.items()}


class Flux2Base(Base):
    """The same for FLUX.2, whose prompts all have one length; each sample edits an image."""

    module, pipeline, latents = flux2_image, Flux2ImagePipeline, (3, 128, 2, 4)
    stock = {"double": flux2_network.Flux2AttnProcessor, "single": flux2_network.Flux2ParallelSelfAttnProcessor}
    padded, unread = [[9], [9], [9]], ()

    def predict(self, prompt_emb_mask, **inputs) -> Tensor:
        edit = some(1, *self.latents[1:], seed=5).expand_as(inputs["latents"])
        return flux2_image.model_fn_flux2(self.dit, edit_latents=[edit], **inputs)

    def blocks(self) -> dict[str, nn.Module]:
        kinds = {"double": self.dit.transformer_blocks, "single": self.dit.single_transformer_blocks}
        return {f"{kind}_{number}": block for kind, blocks in kinds.items() for number, block in enumerate(blocks)}


class Flux1Base(Flux2Base):
    """The same for FLUX.1, whose network reads an embedding of the whole prompt, too."""

    module, pipeline, latents = flux1_network, Flux1ImagePipeline, (3, 16, 4, 8)
    stock = dict.fromkeys(("double", "single"), flux1_network.FluxAttnProcessor)

    def predict(self, prompt_emb_mask, **inputs) -> Tensor:
        edit = some(1, *self.latents[1:], seed=5).expand_as(inputs["latents"])
        pooled = some(1, self.dit.config.pooled_projection_dim, seed=6).expand(len(edit), -1)
        return flux1_image.model_fn_flux1(self.dit, edit_latents=[edit], pooled_prompt_emb=pooled, **inputs)


class WanBase(Base):
    """The same for Wan, which reads a video and prompts of one length."""

    module, pipeline, latents = wan, WanPipeline, (3, 16, 3, 6, 10)
    stock, padded, unread = {"block": WanAttnProcessor}, [[9], [9], [9]], ()

    def __init__(self, dit):
        self.dit = dit
        self.batch = {
            "latents": some(*self.latents),
            "timestep": torch.tensor([100.0, 400.0, 800.0]),
            "prompt_emb": some(3, 9, dit.config.text_dim, seed=1),
        }

    def __call__(self, rows=slice(None), **inputs) -> Tensor:
        return wan.model_fn_wan(self.dit, **{name: tensor[rows] for name, tensor in self.batch.items()}, **inputs)


class GivenFrameBase(WanBase):
    """The same for Wan2.2-TI2V-5B, whose tokens have timesteps of their own: 0 in the first frame of one sample."""

    pipeline, latents = Wan22TI2VPipeline, (3, 48, 3, 6, 10)

    def __init__(self, dit):
        super().__init__(dit)
        self.batch["given_latents"] = some(3, 48, 1, 6, 10, seed=4)
        self.batch["is_given"] = torch.tensor([True, False, False])


def load(kind: type[Base], folder: Path) -> Base:
    """A base with the weights of a model repository in a folder."""
    pipe = kind.pipeline("cpu", torch.float32)
    pipe.build_models([ModelConfig(path=str(folder / "transformer"))])
    pipe.load_models()
    return kind(pipe.dit)
