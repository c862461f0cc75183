"""Small templates, written like those of users, and rows for them."""

import json
from pathlib import Path

import tiny

# A number becomes keys and values of every block; an image becomes that number.
SCALE = """
import numpy as np
import torch
from PIL import Image


class Encoder(torch.nn.Module):
    def __init__(self, dim=128, length=3):
        super().__init__()
        self.mlp = torch.nn.Sequential(torch.nn.Linear(8, dim), torch.nn.SiLU(), torch.nn.Linear(dim, dim))
        self.places = torch.nn.Parameter(torch.randn(length, dim))

    def forward(self, value):
        waves = value[:, None].float() * 10 ** torch.arange(4)
        embedding = torch.cat([waves.cos(), waves.sin()], dim=-1).to(value.dtype)
        return self.mlp(embedding) + self.places


class ScaleTemplate(torch.nn.Module):
    def __init__(self, blocks=("block_0", "block_1", "block_2", "block_3"), heads=4):
        super().__init__()
        self.heads = heads
        self.keys = torch.nn.ModuleDict({name: Encoder() for name in blocks})
        self.values = torch.nn.ModuleDict({name: Encoder() for name in blocks})

    @torch.no_grad()
    def process_inputs(self, pipe, scale, **kwargs):
        return {"value": torch.tensor([scale]).to(pipe.device, pipe.torch_dtype)}

    def forward(self, value, **kwargs):
        pairs = {name: (self.keys[name](value), self.values[name](value)) for name in self.keys}
        view = lambda tokens: tokens.view(1, -1, self.heads, tokens.shape[-1] // self.heads)
        return {"kv_cache": {name: (view(k), view(v)) for name, (k, v) in pairs.items()}}


class Processor:
    def __call__(self, image=None, scale=None, **kwargs):
        if image is not None:
            scale = np.array(Image.open(image)).astype(np.float32).mean() / 255
        return {"scale": scale}


TEMPLATE_MODEL = ScaleTemplate
TEMPLATE_MODEL_PATH = None
TEMPLATE_DATA_PROCESSOR = Processor
"""

# A frozen encoder of the image, then what is trained.
FROZEN_PART = """
import torch


class Template(torch.nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.encoder = torch.nn.Linear(1, 6)
        self.encoder.weight.data = scale * torch.arange(6.0)[:, None]
        self.encoder.bias.data.fill_(0.25)
        self.mlp = torch.nn.Linear(6, 2 * 2 * 128)

    @torch.no_grad()
    def process_inputs(self, scale, **kwargs):
        return {"embedding": self.encoder(torch.tensor([[float(scale)]])), "names": ["block_0", "block_2"]}

    def forward(self, embedding, names, **kwargs):
        key, value = self.mlp(embedding).view(2, 1, 2, 4, 32)
        return {"kv_cache": {name: (key, value) for name in names}}


TEMPLATE_MODEL = Template
"""

# One number as keys and values of every block of FLUX.2-klein-4B, at its sizes.
KLEIN = """
import math

import numpy as np
import torch
from PIL import Image


class ValueEncoder(torch.nn.Module):
    def __init__(self, dim, length, dim_in=256):
        super().__init__()
        self.dim_in = dim_in
        self.embedder = torch.nn.Sequential(torch.nn.Linear(dim_in, dim), torch.nn.SiLU(), torch.nn.Linear(dim, dim))
        self.positions = torch.nn.Parameter(torch.randn(length, dim))

    def forward(self, value):
        half = self.dim_in // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=value.device) / half)
        angles = 1000 * value[:, None].float() * frequencies
        embedding = self.embedder(torch.cat([angles.cos(), angles.sin()], dim=-1).to(value.dtype))
        return embedding + self.positions.to(embedding)


class ValueModel(torch.nn.Module):
    def __init__(self, num_double_blocks=5, num_single_blocks=20, dim=3072, num_heads=24, length=512):
        super().__init__()
        names = [f"double_{i}" for i in range(num_double_blocks)] + [f"single_{i}" for i in range(num_single_blocks)]
        self.proj_k = torch.nn.ModuleDict({name: ValueEncoder(dim, length) for name in names})
        self.proj_v = torch.nn.ModuleDict({name: ValueEncoder(dim, length) for name in names})
        self.num_heads, self.length = num_heads, length

    @torch.no_grad()
    def process_inputs(self, pipe, scale, **kwargs):
        return {"value": torch.Tensor([scale]).to(dtype=pipe.torch_dtype, device=pipe.device)}

    def forward(self, value, **kwargs):
        kv_cache = {}
        for name in self.proj_k:
            k, v = self.proj_k[name](value), self.proj_v[name](value)
            kv_cache[name] = tuple(tokens.view(1, self.length, self.num_heads, -1) for tokens in (k, v))
        return {"kv_cache": kv_cache}


class DataAnnotator:
    def __call__(self, image, **kwargs):
        return {"scale": np.array(Image.open(image)).astype(np.float32).mean() / 255}


TEMPLATE_MODEL = ValueModel
TEMPLATE_MODEL_PATH = None
TEMPLATE_DATA_PROCESSOR = DataAnnotator
"""
# For the miniature.
SMALL = "{'num_double_blocks': 2, 'num_single_blocks': 4, 'dim': 192, 'num_heads': 6, 'length': 3}"
SMALL_KLEIN = f"{KLEIN}\nTEMPLATE_MODEL_CONFIG = {SMALL}\n"


def write(folder: Path, text: str, *changes: tuple[str, str]) -> Path:
    """Write a template's folder; each of `changes` replaces a text of the code by another."""
    folder.mkdir(parents=True, exist_ok=True)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "model.py").write_text(text, encoding="utf-8")
    return folder


def write_rows(folder: Path, inputs=None, count: int = 8) -> Path:
    """Write a tiny data set whose rows have `template_inputs`: a number each, or the result of `inputs(number)`."""
    tiny.write_dataset(folder, count)
    (folder / "metadata.csv").unlink()
    make = inputs or (lambda number: {"scale": round(number / count, 3)})
    rows = [
        {"image": f"{n}.png", "prompt": "a color emoji of " + "red " * n, "template_inputs": make(n)}
        for n in range(count)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def overrides(template: Path, rows: Path) -> list[str]:
    """Overrides of a run that trains a template on these rows."""
    data = [f"dataset.path={rows}", "dataset.metadata=metadata.jsonl"]
    return ["task=template", f"template.path={template}", "lora=none", *data]
