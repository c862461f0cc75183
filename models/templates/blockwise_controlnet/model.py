"""Blockwise ControlNet: an image, such as edges or depths, guides Qwen-Image after each of its blocks.

A block of this network reads what a block of the transformer has computed of the image, and adds to it. Outputs are
zero before the training. The layout is that of the released DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Canny,
-Depth and -Inpaint; see README.md. Shapes: L tokens of the image, D width.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from diffsynth.core.data.operators.images import ImageCropAndResize

CHANNELS = 16  # of the latents, of which 2 × 2 pixels are a token


class ControlBlock(nn.Module):
    """What is added after one block of the transformer: output(gelu(input(norm(x) + norm(y))))."""

    def __init__(self, width: int):
        super().__init__()
        self.x_rms, self.y_rms = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.input_proj, self.output_proj = nn.Linear(width, width), nn.Linear(width, width)
        zero(self.output_proj)

    def forward(self, image: Tensor, condition: Tensor) -> Tensor:
        """The update (B, L, D) of the image's tokens (B, L, D) under a condition (B, L, D)."""
        return self.output_proj(F.gelu(self.input_proj(self.x_rms(image) + self.y_rms(condition))))


class BlockwiseControlNet(nn.Module):
    """Turns an image into a condition, and has a block for each of the transformer's.

    Args:
        blocks: Number of the transformer's blocks.
        width: Width D of the transformer.
        inpaint: Read a mask, too, whose white area is sampled anew.
    """

    def __init__(self, blocks: int = 60, width: int = 3072, inpaint: bool = False):
        super().__init__()
        self.inpaint = inpaint
        self.img_in = nn.Linear(4 * (CHANNELS + inpaint), width)
        zero(self.img_in)
        self.controlnet_blocks = nn.ModuleList(ControlBlock(width) for _ in range(blocks))

    @torch.no_grad()
    def process_inputs(
        self,
        image: Image.Image,
        pipe,
        height: int,
        width: int,
        mask: Image.Image | None = None,
        scale: float = 1.0,
        **kwargs,
    ) -> dict[str, Tensor | float]:
        """Latents (1, 16, h, w) of the image in the sample's size; with a mask, 1 - mask is channel 17."""
        if (mask is None) == self.inpaint:
            raise ValueError(
                f"mask is {mask}, but this ControlNet has inpaint={self.inpaint}; give one, or leave it out."
            )
        resize = ImageCropAndResize(height, width)  # as the data set crops the image that is trained
        image = resize(image.convert("RGB"))
        if mask is None:
            return {"latents": pipe.vae.encode(pipe.preprocess_image(image)), "scale": float(scale)}
        white = np.asarray(resize(mask.convert("RGB")), dtype=np.float32).mean(axis=-1) / 255
        black = Image.fromarray(np.where(white[..., None] > 0.5, 0, np.asarray(image)).astype(np.uint8))
        latents = pipe.vae.encode(pipe.preprocess_image(black))
        kept = 1 - F.interpolate(torch.from_numpy(white)[None, None], latents.shape[-2:])
        return {"latents": torch.cat([latents, kept.to(latents)], dim=1), "scale": float(scale)}

    def forward(self, latents: Tensor, scale: float, **kwargs) -> dict[str, dict]:
        """The blocks by the names of the transformer's, and the condition (1, L, D) that they read."""
        tokens = F.pixel_unshuffle(latents, 2).flatten(2).mT
        layers = {f"block_{number}": block for number, block in enumerate(self.controlnet_blocks)}
        condition = self.img_in(tokens.to(self.img_in.weight.dtype))
        return {"block_residuals": {"layers": layers, "condition": condition, "scale": scale}}


def zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


class DataProcessor:
    """Opens the images that a row names."""

    def __call__(self, image: str, mask: str | None = None, **kwargs) -> dict[str, Image.Image | float]:
        files = {"image": image} | ({"mask": mask} if mask else {})
        return {name: Image.open(file).convert("RGB") for name, file in files.items()} | kwargs


TEMPLATE_MODEL = BlockwiseControlNet
TEMPLATE_MODEL_CONFIG = {"blocks": 60, "width": 3072, "inpaint": False}
TEMPLATE_MODEL_PATH = None
TEMPLATE_DATA_PROCESSOR = DataProcessor
