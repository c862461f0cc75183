"""The metrics of sampled images, on networks of the real classes with random weights."""

import logging

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from diffsynth.core.loader import ModelConfig
from diffsynth.training.validation.metrics import FrechetDistance, Lpips, Retrieval

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> ModelConfig:
    """A DINOv2 with its processor."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return ModelConfig(path=str(folder))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


def measured(metric, sampled, prompts, targets) -> float:
    metric.find()
    return metric.measure(sampled, prompts, targets, CPU)


def test_every_sampled_image_finds_its_own_target_or_another(images):
    assert measured(Retrieval(), images, [], images) == 1
    assert measured(Retrieval(), images[1:] + images[:1], [], images) == 0


def test_the_frechet_distance_is_nothing_between_the_same_and_follows_its_formula(dino, images):
    metric = FrechetDistance(dino, batch_size=4)
    brighter = [image.point(lambda value: value // 4 + 190) for image in images]
    features = [
        metric.network(**metric.processor(images=side, return_tensors="pt")).pooler_output.double()
        for side in (metric.find() or images, brighter)
    ]
    means, covariances = [f.mean(0) for f in features], [torch.cov(f.T) for f in features]
    crossed = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()
    expected = (means[0] - means[1]).square().sum() + sum(c.trace() for c in covariances) - 2 * crossed
    assert measured(metric, brighter, [], images) == pytest.approx(expected.item(), rel=1e-3)
    assert measured(metric, images, [], images) == pytest.approx(0, abs=1e-3 * expected.item())


def test_equal_pictures_have_no_perceptual_distance(images):
    pytest.importorskip("torchvision")
    assert measured(Lpips(), images, [], images) == 0 < measured(Lpips(), images[1:] + images[:1], [], images)


def test_a_metric_without_weights_is_left_out_with_a_clear_line(tmp_path, caplog):
    validation = [
        "validation=[jpeg_size,frechet_distance]",
        "validation.metric_samples=2",
        "validation.options={num_inference_steps: 1, height: 32, width: 32}",
        "validation.metrics.frechet_distance.model.path=nowhere",
        "+validation.datasets.held_out._target_=diffsynth.core.data.UnifiedDataset",
        f"+validation.datasets.held_out.base_path={tiny.dataset()}",
    ]
    with caplog.at_level(logging.WARNING):
        run_dir = tiny.train(tmp_path, *validation)
    assert "validation.metrics.frechet_distance is left out" in caplog.text and "nowhere does not exist" in caplog.text
    assert [name for name in tiny.metrics(run_dir)[0] if name.endswith(("size", "distance"))] == ["held_out_jpeg_size"]
