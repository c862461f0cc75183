"""Brightness: `scale` in [0, 1] is the mean of the image's pixels; on the embedded model 0.5 is dark, 0.95 pale.

A small network turns the number into a few keys and values for every block. For FLUX.2-klein-4B, TEMPLATE_MODEL_CONFIG
is {"blocks": {"double": 5, "single": 20}, "heads": 24, "head_dim": 128}.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


class BrightnessTemplate(nn.Module):
    """Turns a number into keys and values.

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
        self.encoder = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleDict({name: nn.Linear(width, 2 * tokens * heads * head_dim) for name in names})

    @torch.no_grad()
    def process_inputs(self, scale: float, pipe, **kwargs) -> dict[str, Tensor]:
        """`scale` in [0, 1] as a tensor (1, 1)."""
        return {"scale": torch.tensor([[scale]], device=pipe.device, dtype=pipe.torch_dtype)}

    def forward(self, scale: Tensor, **kwargs) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
        """Keys and values (1, tokens, heads, head_dim) of every block."""
        hidden = self.encoder(2 * scale - 1)
        return {"kv_cache": {name: tuple(layer(hidden).view(self.shape)) for name, layer in self.blocks.items()}}


class DataProcessor:
    """Computes `scale` from an image that a row names, unless the row has `scale` itself."""

    def __call__(self, image: str | None = None, scale: float | None = None, **kwargs) -> dict[str, float]:
        return {"scale": scale if image is None else float(np.asarray(Image.open(image).convert("RGB")).mean() / 255)}


TEMPLATE_MODEL = BrightnessTemplate
TEMPLATE_MODEL_CONFIG = {"blocks": {"block": 4}, "heads": 4, "head_dim": 32}
TEMPLATE_MODEL_PATH = "model.safetensors"
TEMPLATE_DATA_PROCESSOR = DataProcessor
