"""Metrics of what a model samples for held-out prompts; their networks are transformers' and torchmetrics'.

They compare images. Of other media they get the thumbnails (`diffusion.pipeline.media.Media.thumbnail`).
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...core.loader import ModelConfig, read_pretrained
from ...core.ranges import BatchSize

Images = Sequence[Image.Image]


class Metric:
    """The base class of metrics."""

    def find(self) -> None:
        """Find the packages and weight files that `measure` needs, without reading weights.

        Raises:
            ImportError, OSError: A package is not installed, or weights are neither on disk nor downloadable.
        """

    def measure(self, images: Images, prompts: Sequence[str], targets: Images, device: torch.device) -> float:
        """Return the metric of sampled images.

        Args:
            images: The sampled images, one per row.
            prompts: The rows' prompts.
            targets: The rows' own images.
            device: Device of the metric's network.
        """
        raise NotImplementedError


class Retrieval(Metric):
    """Share of images that are nearer (in pixels) to their own row's target than to any other's; chance is 1 / N."""

    def measure(self, images: Images, prompts: Sequence[str], targets: Images, device: torch.device) -> float:
        nearest = torch.cdist(_pixels(images).flatten(1), _pixels(targets).flatten(1)).argmin(1)
        return (nearest == torch.arange(len(images))).float().mean().item()


class _NetworkMetric(Metric):
    """A metric whose network is loaded at its first use and is on the device only while it measures."""

    def __init__(self, model: ModelConfig, batch_size: BatchSize = 16):
        self.model, self.batch_size = model, batch_size

    def find(self) -> None:
        self._files = self.model.resolve()

    @property
    def folder(self) -> Path:
        """Folder of the network's files."""
        return self._files[0] if self._files[0].is_dir() else self._files[0].parent

    def _batched(self, embed: Callable[..., Tensor], device: torch.device, *columns: Sequence) -> Tensor:
        """Run `embed(*batch)` over all rows in batches, and concatenate its results (B, …) to (N, …)."""
        self.network.to(device)
        starts = range(0, len(columns[0]), self.batch_size)
        batches = [[column[start : start + self.batch_size] for column in columns] for start in starts]
        results = [embed(*batch).float().cpu() for batch in batches]
        self.network.to("cpu")
        return torch.cat(results)


class ClipScore(_NetworkMetric):
    """CLIP score: the mean over rows of 100 max(cos(image, prompt), 0), the cosine of CLIP's embeddings.

    Hessel et al. 2021 (https://arxiv.org/abs/2104.08718). Prompts are cut at CLIP's 77 tokens.
    """

    @cached_property
    def network(self) -> nn.Module:
        from transformers import CLIPModel

        return read_pretrained(CLIPModel, self.folder, use_safetensors=True).eval()

    @cached_property
    def processor(self):
        from transformers import CLIPProcessor

        return read_pretrained(CLIPProcessor, self.folder)

    def measure(self, images: Images, prompts: Sequence[str], targets: Images, device: torch.device) -> float:
        def cosine(some: Images, texts: Sequence[str]) -> Tensor:
            inputs = self.processor(
                text=list(texts), images=list(some), padding=True, truncation=True, return_tensors="pt"
            )
            out = self.network(**inputs.to(device))
            return (out.image_embeds * out.text_embeds).sum(1)

        return 100 * self._batched(cosine, device, images, prompts).clamp(min=0).mean().item()


class FrechetDistance(_NetworkMetric):
    """FID: |μ - μ'|² + tr(Σ + Σ' - 2 (Σ Σ')^½), the Fréchet distance of sampled images' and targets' features.

    Heusel et al. 2017 (https://arxiv.org/abs/1706.08500), but with DINOv2's features: they agree with people's
    judgement where Inception's do not (Stein et al. 2023, https://arxiv.org/abs/2306.04675). Comparing runs takes
    thousands of rows; with fewer, compare only evaluations of the same rows within one run.
    """

    @cached_property
    def network(self) -> nn.Module:
        from transformers import AutoModel

        return read_pretrained(AutoModel, self.folder, use_safetensors=True).eval()

    @cached_property
    def processor(self):
        # The name that the package exports needs torchvision in most releases; the class itself does not.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        return read_pretrained(AutoImageProcessor, self.folder)

    def find(self) -> None:
        super().find()
        _require_package("torchmetrics")

    def measure(self, images: Images, prompts: Sequence[str], targets: Images, device: torch.device) -> float:
        from torchmetrics.image.fid import FrechetInceptionDistance

        def features(some: Images) -> Tensor:
            return self.network(**self.processor(images=list(some), return_tensors="pt").to(device)).pooler_output

        features_of = {True: self._batched(features, device, targets), False: self._batched(features, device, images)}
        computed = nn.Identity()  # torchmetrics gets features instead of images
        computed.num_features = features_of[True].shape[1]
        distance = FrechetInceptionDistance(feature=computed)
        for is_real, side in features_of.items():
            distance.update(side, real=is_real)
        return distance.compute().item()


class Lpips(Metric):
    """LPIPS: mean perceptual distance between an image and its row's target, in a network's features.

    Zhang et al. 2018 (https://arxiv.org/abs/1801.03924).

    Args:
        network: `alex`, `vgg` or `squeeze`; torchvision downloads its weights.
    """

    def __init__(self, network: str = "alex"):
        self.network = network

    def find(self) -> None:
        _require_package("torchmetrics")
        _require_package("torchvision")
        _ = self.distance  # raises OSError if torchvision has to download the weights and there is no connection

    @cached_property
    def distance(self) -> nn.Module:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity(self.network, normalize=True)

    def measure(self, images: Images, prompts: Sequence[str], targets: Images, device: torch.device) -> float:
        distance = self.distance.to(device)
        distance.reset()
        for image, target in zip(images, targets, strict=True):
            distance.update(*(_pixels([i.resize(target.size)]).to(device) / 255 for i in (image, target)))
        return distance.compute().item()


def _require_package(package: str) -> None:
    if find_spec(package) is None:
        raise ImportError(f"{package} is not installed; pip install {package}")


def _pixels(images: Images) -> Tensor:
    """Return images of one size as a tensor (N, 3, H, W) in [0, 255]."""
    arrays = [np.array(image.convert("RGB"), dtype=np.float32) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
