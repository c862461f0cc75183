"""Metrics of what a model samples for held-out prompts; their networks are transformers' and torchmetrics'.

They compare images. Of other media they get the thumbnails (`diffusion.pipeline.media.Media.thumbnail`). The rewards in
`diffusion.rewards` are metrics, too.
"""

from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...core.loader import read_pretrained
from ...diffusion.rewards.network import LoadedNetwork

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


class FrechetDistance(LoadedNetwork, Metric):
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

        features_of = {True: self.batched(features, device, targets), False: self.batched(features, device, images)}
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
