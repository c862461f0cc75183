"""What drawings of held-out prompts are measured by; networks come from transformers and torchmetrics."""

from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...core.loader import ModelConfig

Images = Sequence[Image.Image]


class Metric:
    """A number that a set of drawings gets; `measure(drawn, prompts, targets)` has one of each for every row."""

    def find(self) -> None:
        """Find what it needs; reads no weights.

        Raises:
            ImportError, OSError: A package or weights are neither here nor to be had.
        """

    def measure(self, drawn: Images, prompts: Sequence[str], targets: Images, device: torch.device) -> float:
        raise NotImplementedError


class Retrieval(Metric):
    """Share of drawings that are nearer (in pixels) to their own row's image than to any other's: 1 / N is chance."""

    def measure(self, drawn: Images, prompts: Sequence[str], targets: Images, device: torch.device) -> float:
        nearest = torch.cdist(_pixels(drawn).flatten(1), _pixels(targets).flatten(1)).argmin(1)
        return (nearest == torch.arange(len(drawn))).float().mean().item()


class _OfNetwork(Metric):
    """A metric whose network, loaded at the first use, is on the device only while it measures."""

    def __init__(self, model: ModelConfig, batch_size: int = 16):
        self.model, self.batch_size = model, batch_size

    def find(self) -> None:
        self._files = self.model.resolve()

    @property
    def folder(self) -> Path:
        return self._files[0] if self._files[0].is_dir() else self._files[0].parent

    def _batched(self, embed, device: torch.device, *columns: Sequence) -> Tensor:
        """`embed(*batch)` of all rows, batch by batch."""
        self.network.to(device)
        starts = range(0, len(columns[0]), self.batch_size)
        made = [embed(*(column[i : i + self.batch_size] for column in columns)).float().cpu() for i in starts]
        self.network.to("cpu")
        return torch.cat(made)


class ClipScore(_OfNetwork):
    """100 max(cos(image, prompt), 0) in CLIP's space, mean over rows: Hessel et al. 2021 (https://arxiv.org/abs/2104.08718).

    Prompts are cut at CLIP's 77 tokens.
    """

    @cached_property
    def network(self) -> nn.Module:
        from transformers import CLIPModel

        return CLIPModel.from_pretrained(self.folder, use_safetensors=True).eval()

    @cached_property
    def processor(self):
        from transformers import CLIPProcessor

        return CLIPProcessor.from_pretrained(self.folder)

    def measure(self, drawn: Images, prompts: Sequence[str], targets: Images, device: torch.device) -> float:
        def cosine(images, texts):
            inputs = self.processor(
                text=list(texts), images=list(images), padding=True, truncation=True, return_tensors="pt"
            )
            out = self.network(**inputs.to(device))
            return (out.image_embeds * out.text_embeds).sum(1)

        return 100 * self._batched(cosine, device, drawn, prompts).clamp(min=0).mean().item()


class FrechetDistance(_OfNetwork):
    """|μ - μ'|² + tr(Σ + Σ' - 2 (Σ Σ')^½) of an image network's features of drawings and of the rows' images.

    FID (Heusel et al. 2017, https://arxiv.org/abs/1706.08500) with DINOv2's features, which follow people's judgement
    where Inception's do not (Stein et al. 2023, https://arxiv.org/abs/2306.04675). Comparing runs takes thousands
    of rows; with fewer, only looks of one run at the same rows compare.
    """

    @cached_property
    def network(self) -> nn.Module:
        from transformers import AutoModel

        return AutoModel.from_pretrained(self.folder, use_safetensors=True).eval()

    @cached_property
    def processor(self):
        # The name that the package exports needs torchvision in most releases; the class itself does not.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(self.folder)

    def find(self) -> None:
        super().find()
        _need("torchmetrics")

    def measure(self, drawn: Images, prompts: Sequence[str], targets: Images, device: torch.device) -> float:
        from torchmetrics.image.fid import FrechetInceptionDistance

        def features(images):
            return self.network(**self.processor(images=list(images), return_tensors="pt").to(device)).pooler_output

        sides = {real: self._batched(features, device, images) for real, images in ((True, targets), (False, drawn))}
        given = nn.Identity()
        given.num_features = sides[True].shape[1]
        distance = FrechetInceptionDistance(feature=given)
        for real, side in sides.items():
            distance.update(side, real=real)
        return distance.compute().item()


class Lpips(Metric):
    """Distance between a drawing and its row's image in a network's features: Zhang et al. 2018 (https://arxiv.org/abs/1801.03924).

    Args:
        network: `alex`, `vgg` or `squeeze`; torchvision downloads its weights.
    """

    def __init__(self, network: str = "alex"):
        self.network = network

    def find(self) -> None:
        _need("torchmetrics")
        _need("torchvision")
        _ = self.distance  # OSError without a network, where torchvision has not downloaded before

    @cached_property
    def distance(self) -> nn.Module:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity(self.network, normalize=True)

    def measure(self, drawn: Images, prompts: Sequence[str], targets: Images, device: torch.device) -> float:
        distance = self.distance.to(device)
        distance.reset()
        for image, target in zip(drawn, targets, strict=True):
            distance.update(*(_pixels([i.resize(target.size)]).to(device) / 255 for i in (image, target)))
        return distance.compute().item()


def _need(package: str) -> None:
    if find_spec(package) is None:
        raise ImportError(f"{package} is not installed; pip install {package}")


def _pixels(images: Images) -> Tensor:
    """Images of one size as (N, 3, H, W) in [0, 255]."""
    arrays = [np.array(image.convert("RGB"), dtype=np.float32) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
