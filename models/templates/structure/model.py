"""Structure: line art defines where things are, and the prompt may say what they are.

A small network turns the line art into a grid of keys and values for every block, on the embedded model one for each
16 × 16 pixels. For FLUX.2-klein-4B, TEMPLATE_MODEL_CONFIG is
{"blocks": {"double": 5, "single": 20}, "heads": 24, "head_dim": 128, "size": 1024, "grid": 32, "width": 1024}.
"""

from itertools import pairwise

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn


class StructureTemplate(nn.Module):
    """Turns line art into keys and values.

    Args:
        blocks: The base's kinds of blocks, and the number of blocks of each kind.
        heads, head_dim: Heads of the base's attention, and their width.
        size: Height and width in pixels to which the image is resized.
        grid: Keys per block, along each side; `size` is `grid` times 4, 8, 16 and so on.
        width: Channels of the last convolution.
    """

    def __init__(
        self,
        blocks: dict[str, int] | None = None,
        heads: int = 4,
        head_dim: int = 32,
        size: int = 64,
        grid: int = 4,
        width: int = 128,
    ):
        super().__init__()
        self.size, self.heads = size, (2, heads, head_dim)
        names = [f"{kind}_{number}" for kind, count in (blocks or {"block": 4}).items() for number in range(count)]
        self.encoder = convolutions(halvings=(size // grid).bit_length() - 1, width=width)
        self.places = nn.Parameter(torch.randn(grid**2, width))
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleDict({name: nn.Linear(width, 2 * heads * head_dim) for name in names})

    @torch.no_grad()
    def process_inputs(self, image: Image.Image, pipe, **kwargs) -> dict[str, Tensor]:
        """Grey levels (1, 1, size, size) of an image of any size, 0 for white and 1 for black."""
        grey = np.asarray(image.convert("L").resize((self.size, self.size)), dtype=np.float32)
        pixels = 1 - torch.from_numpy(grey)[None, None] / 255
        return {"pixels": pixels.to(pipe.device, pipe.torch_dtype)}

    def forward(self, pixels: Tensor, **kwargs) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
        """Keys and values (1, grid², heads, head_dim) of every block."""
        tokens = self.norm(self.encoder(pixels).flatten(2).mT + self.places)
        pairs = {name: layer(tokens).unflatten(-1, self.heads).unbind(2) for name, layer in self.blocks.items()}
        return {"kv_cache": pairs}


def convolutions(halvings: int, width: int) -> nn.Sequential:
    """Convolutions from (B, 1, H, W) to (B, width, H / 2ⁿ, W / 2ⁿ) for n `halvings`.

    The first convolution halves twice; each further one halves once and doubles the channels.
    """
    widths = [width >> step for step in reversed(range(halvings - 1))]
    layers = [nn.Conv2d(1, widths[0], 4, 4), nn.SiLU()]
    for narrow, wide in pairwise(widths):
        layers += [nn.Conv2d(narrow, wide, 4, 2, 1), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, width, 3, padding=1))


class DataProcessor:
    """Opens the image that a row names, and mirrors it if the row says so."""

    def __call__(self, image: str, mirror: bool = False, **kwargs) -> dict[str, Image.Image]:
        opened = Image.open(image).convert("L")
        return {"image": ImageOps.mirror(opened) if mirror else opened}


TEMPLATE_MODEL = StructureTemplate
TEMPLATE_MODEL_CONFIG = {"blocks": {"block": 4}, "heads": 4, "head_dim": 32}
TEMPLATE_MODEL_PATH = "model.safetensors"
TEMPLATE_DATA_PROCESSOR = DataProcessor
