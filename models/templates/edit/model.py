"""Edit: a reference image defines the object, and the prompt says what to change.

The base's autoencoder encodes the reference. A small network turns the latents into a grid of keys and values for every
block, one for each 16 × 16 pixels. For FLUX.2-klein-4B, whose latents come in patches, TEMPLATE_MODEL_CONFIG is
{"blocks": {"double": 5, "single": 20}, "heads": 24, "head_dim": 128, "size": 512, "channels": 128, "patch": 1,
"width": 1024}.
"""

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn


class EditTemplate(nn.Module):
    """Turns the latents of an image into keys and values.

    Args:
        blocks: The base's kinds of blocks, and the number of blocks of each kind.
        heads, head_dim: Heads of the base's attention, and their width.
        size: Height and width in pixels to which the image is resized.
        channels: Channels of the base's latents.
        patch: Latent pixels per key, along each side.
        width: Width of the hidden layers.
    """

    def __init__(
        self,
        blocks: dict[str, int] | None = None,
        heads: int = 4,
        head_dim: int = 32,
        size: int = 64,
        channels: int = 16,
        patch: int = 2,
        width: int = 128,
    ):
        super().__init__()
        self.size, self.heads = size, (2, heads, head_dim)
        names = [f"{kind}_{number}" for kind, count in (blocks or {"block": 4}).items() for number in range(count)]
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, patch, patch), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.places = nn.Parameter(torch.randn((size // 16) ** 2, width))
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleDict({name: nn.Linear(width, 2 * heads * head_dim) for name in names})

    @torch.no_grad()
    def process_inputs(self, image: Image.Image, pipe, **kwargs) -> dict[str, Tensor]:
        """Latents (1, channels, h, w) of an image of any size; a cache stores them in place of the autoencoder."""
        pixels = pipe.preprocess_image(image.convert("RGB").resize((self.size, self.size)))
        return {"latents": pipe.vae.encode(pixels)}

    def forward(self, latents: Tensor, **kwargs) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
        """Keys and values (1, (size / 16)², heads, head_dim) of every block."""
        tokens = self.norm(self.encoder(latents).flatten(2).mT + self.places)
        pairs = {name: layer(tokens).unflatten(-1, self.heads).unbind(2) for name, layer in self.blocks.items()}
        return {"kv_cache": pairs}


class DataProcessor:
    """Opens the image that a row names, and mirrors it if the row says so."""

    def __call__(self, image: str, mirror: bool = False, **kwargs) -> dict[str, Image.Image]:
        opened = Image.open(image).convert("RGB")
        return {"image": ImageOps.mirror(opened) if mirror else opened}


TEMPLATE_MODEL = EditTemplate
TEMPLATE_MODEL_CONFIG = {"blocks": {"block": 4}, "heads": 4, "head_dim": 32}
TEMPLATE_MODEL_PATH = "model.safetensors"
TEMPLATE_DATA_PROCESSOR = DataProcessor
