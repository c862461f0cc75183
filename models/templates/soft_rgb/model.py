"""Soft RGB: `r`, `g`, `b` in [0, 1] are the mean colour of the image; on the embedded model from 0.5 to 0.95.

A small network turns the numbers into a few keys and values for every block. For FLUX.2-klein-4B, TEMPLATE_MODEL_CONFIG
is {"blocks": {"double": 5, "single": 20}, "heads": 24, "head_dim": 128}.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


class SoftRGBTemplate(nn.Module):
    """Turns a colour into keys and values.

    Args:
        blocks: The base's kinds of blocks, and the number of blocks of each kind.
        heads, head_dim: Heads of the base's attention, and their width.
        tokens: Number of extra keys per block.
        width: Width of the hidden layers.
    """

    def __init__(
        self,
        blocks: dict[str, int] | None = None,
        heads: int = 4,
        head_dim: int = 32,
        tokens: int = 4,
        width: int = 64,
    ):
        super().__init__()
        self.shape = (2, 1, tokens, heads, head_dim)
        names = [f"{kind}_{number}" for kind, count in (blocks or {"block": 4}).items() for number in range(count)]
        self.encoder = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleDict({name: nn.Linear(width, 2 * tokens * heads * head_dim) for name in names})

    @torch.no_grad()
    def process_inputs(self, r: float, g: float, b: float, pipe, **kwargs) -> dict[str, Tensor]:
        """The colour, each channel in [0, 1], as a tensor (1, 3)."""
        return {"colour": torch.tensor([[r, g, b]], device=pipe.device, dtype=pipe.torch_dtype)}

    def forward(self, colour: Tensor, **kwargs) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
        """Keys and values (1, tokens, heads, head_dim) of every block."""
        hidden = self.encoder(2 * colour - 1)
        return {"kv_cache": {name: tuple(layer(hidden).view(self.shape)) for name, layer in self.blocks.items()}}


class DataProcessor:
    """Computes `r`, `g` and `b`, the mean colour of an image that a row names."""

    def __call__(self, image: str, **kwargs) -> dict[str, float]:
        means = np.asarray(Image.open(image).convert("RGB")).mean((0, 1)) / 255
        return dict(zip("rgb", means.tolist(), strict=True))


TEMPLATE_MODEL = SoftRGBTemplate
TEMPLATE_MODEL_CONFIG = {"blocks": {"block": 4}, "heads": 4, "head_dim": 32}
TEMPLATE_MODEL_PATH = "model.safetensors"
TEMPLATE_DATA_PROCESSOR = DataProcessor
