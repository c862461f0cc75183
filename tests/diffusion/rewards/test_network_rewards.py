"""Rewards by networks of the real classes with random weights: their formulas, their inputs, their gradients."""

import json
import shutil
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from diffsynth.core.loader import ModelConfig
from diffsynth.diffusion.rewards import Aesthetic, ClipScore, HpsV2, PickScore, Reward, hps_v2, pixels_of
from diffsynth.diffusion.rewards.aesthetic import predictor_of

CPU = torch.device("cpu")
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PROMPTS = ["a red apple", "", "a bear " * 99, "a dog", "an owl", "a cat"]
ROUNDED = 1.25 / 255  # the processor rounds to 8 bits twice; 1.08 / 255 was measured on noise


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """The folder of a CLIP with its processor, laid out as on the hubs."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [f"{letter}{end}" for letter in string.ascii_lowercase for end in ("", "</w>")]
    vocab = {token: number for number, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    special = {"bos_token_id": vocab["<|startoftext|>"], "eos_token_id": vocab["<|endoftext|>"]}
    text, vision = TINY | special | {"vocab_size": len(vocab)}, TINY | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    small = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    CLIPProcessor(CLIPImageProcessorPil(**small), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def predictor(tmp_path_factory) -> Path:
    """The file of the layers of `Aesthetic`, with the names of the released one."""
    torch.manual_seed(1)
    file = tmp_path_factory.mktemp("aesthetic") / "linear.safetensors"
    save_file(predictor_of(8).state_dict(), file)
    return file


@pytest.fixture
def reward(request, clip, predictor) -> Reward:
    model = ModelConfig(path=str(clip))
    made = {
        "clip": lambda: ClipScore(model, batch_size=4),
        "pick": lambda: PickScore(model, ModelConfig(path=str(clip)), batch_size=4),
        "aesthetic": lambda: Aesthetic(model, ModelConfig(path=str(predictor)), batch_size=4),
    }[request.param]()
    made.find()
    return made


of_all = pytest.mark.parametrize("reward", ["clip", "pick", "aesthetic"], indirect=True)
of_clip = pytest.mark.parametrize("reward", ["clip"], indirect=True)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


def score(reward: Reward, images: list[Image.Image], prompts: list[str] = PROMPTS) -> Tensor:
    return reward.score(images, prompts, [{}] * len(images), CPU)


def networks_own(reward: Reward, image: Image.Image, prompt: str):
    """What the network returns for the processor's own input."""
    inputs = reward.processor(
        text=[prompt], images=[image], truncation=True, max_length=77, return_tensors="pt", padding=True
    )
    return reward.network(**inputs)


@torch.no_grad()
def by_hand(reward: Reward, image: Image.Image, prompt: str) -> float:
    out = networks_own(reward, image, prompt)
    if isinstance(reward, Aesthetic):
        features = out.image_embeds[0].double()
        for layer in reward.network.aesthetic.layers:
            features = layer.weight.double() @ features + layer.bias.double()
        return features.item()
    logit = out.logits_per_image.item()
    return logit / 26 if isinstance(reward, PickScore) else 100 * logit / reward.network.logit_scale.exp().item()


@of_all
def test_a_score_is_that_of_its_formula_for_each_picture_with_its_own_prompt(reward, images):
    expected = [by_hand(reward, image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    torch.testing.assert_close(score(reward, images), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@of_all
def test_gradients_reach_every_picture_and_no_weight(reward, images):
    pixels = torch.stack([pixels_of(image) for image in images]).requires_grad_()
    scores = reward.score_pixels(pixels, PROMPTS, [{}] * 6)
    torch.testing.assert_close(scores.detach(), score(reward, images), rtol=1e-4, atol=1e-5)
    scores.sum().backward()
    assert pixels.grad.isfinite().all() and (pixels.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(weight.grad is None and not weight.requires_grad for weight in reward.network.parameters())
    better = reward.score_pixels(pixels + 1e-2 * pixels.grad / pixels.grad.norm(), PROMPTS, [{}] * 6)
    assert better.sum() > scores.sum()


@of_all
def test_scores_do_not_depend_on_an_autocast_around_them(reward, images):
    pixels = torch.stack([pixels_of(image) for image in images])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = reward.score_pixels(pixels.bfloat16().float(), PROMPTS, [{}] * 6)
    with torch.no_grad():
        assert torch.equal(found, reward.score_pixels(pixels.bfloat16().float(), PROMPTS, [{}] * 6))


@of_clip
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (100, 70), (70, 100), (45, 33), (20, 24)])
def test_the_input_is_the_processors_but_for_its_rounding(reward, size):
    values = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(values)
    expected = reward.processor.image_processor(image, return_tensors="pt")["pixel_values"]
    std = torch.tensor(reward.processor.image_processor.image_std).view(3, 1, 1)
    found = reward.prepare(pixels_of(image)[None])
    assert found.shape == expected.shape == (1, 3, 32, 32)
    assert ((found - expected) * std).abs().max() < ROUNDED


@of_clip
def test_values_that_the_resizing_overshoots_are_clamped_but_keep_their_gradients(reward):
    """The gradient of a linear function is the same everywhere: at an edge of black and white as in grey."""
    edge, grey = torch.zeros(1, 3, 50, 40), torch.full((1, 3, 50, 40), 0.5)
    edge[..., 20:] = 1
    gradients = []
    for pixels in (edge.requires_grad_(), grey.requires_grad_()):
        prepared = reward.prepare(pixels)
        prepared.sum().backward()
        gradients.append(pixels.grad)
    torch.testing.assert_close(*gradients)
    white = reward.prepare(torch.ones(1, 3, 50, 40))
    assert (reward.prepare(edge) <= white + 1e-6).all()


@of_clip
def test_pictures_of_all_sizes_are_scored_in_one_batch(reward, images):
    mixed = [images[0], images[1].resize((64, 40)), images[2].resize((40, 64))]
    alone = [score(reward, [image], [prompt]) for image, prompt in zip(mixed, PROMPTS, strict=False)]
    torch.testing.assert_close(score(reward, mixed, PROMPTS[:3]), torch.cat(alone), rtol=1e-4, atol=1e-4)


@of_clip
def test_as_a_metric_negative_scores_count_as_nothing(reward, images):
    scores = score(reward, images)
    assert (scores < 0).any() and (scores > 0).any()
    assert reward.measure(images, PROMPTS, images, CPU) == pytest.approx(scores.clamp(min=0).mean().item(), rel=1e-4)


@of_all
def test_the_network_is_read_once_and_waits_on_the_cpu(reward, images):
    score(reward, images)
    network = reward.network
    score(reward, images)
    assert network is reward.network and next(network.parameters()).device == CPU


def test_the_version_tells_other_weights_apart(clip, predictor, tmp_path):
    def version(file: Path) -> str:
        return Aesthetic(ModelConfig(path=str(clip)), ModelConfig(path=str(file))).version

    torch.manual_seed(2)
    save_file(predictor_of(8).state_dict(), tmp_path / "other.safetensors")
    assert version(predictor) == version(predictor) != version(tmp_path / "other.safetensors")
    assert ClipScore(ModelConfig(path=str(clip))).version.startswith("ClipScore ")


def test_the_version_tells_other_processors_apart(clip, tmp_path):
    def version(folder: Path) -> str:
        return PickScore(ModelConfig(path=str(clip)), ModelConfig(path=str(folder))).version

    other = shutil.copytree(clip, tmp_path / "other")
    assert version(other) == version(clip)
    (other / "tokenizer_config.json").write_text("{}")
    assert version(other) != version(clip)


def test_layers_for_another_clip_are_refused(clip, tmp_path, images):
    save_file(predictor_of(9).state_dict(), tmp_path / "wide.safetensors")
    wrong = Aesthetic(ModelConfig(path=str(clip)), ModelConfig(path=str(tmp_path / "wide.safetensors")))
    with pytest.raises(ValueError, match=r"layers\.0\.weight"):
        score(wrong, images)


# OpenCLIP -------------------------------------------------------------------------------------------------------------


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(hps_v2, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'open_clip is not installed; pip install "diffsynth-hydra\[hps\]"'):
        HpsV2(ModelConfig(path="nowhere")).find()


@pytest.fixture
def hps(tmp_path, monkeypatch) -> HpsV2:
    """HPS v2 with a small architecture and random weights."""
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    monkeypatch.setattr(hps_v2, "ARCHITECTURE", "tiny")
    torch.manual_seed(0)
    save_file(open_clip.create_model("tiny").state_dict(), tmp_path / "weights.safetensors")
    return HpsV2(ModelConfig(path=str(tmp_path / "weights.safetensors")), batch_size=4)


def test_hps_is_the_cosine_of_each_picture_with_its_prompt(hps, images):
    hps.find()
    found = score(hps, images)
    for image, prompt, one in zip(images, PROMPTS, found, strict=True):
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (hps_v2.MEAN, hps_v2.STD))
        out = hps.network((pixels_of(image)[None] - mean) / std, hps.tokenizer([prompt]))
        assert one.item() == pytest.approx((out[0] * out[1]).sum().item(), abs=1e-5)


def test_hps_pads_a_picture_that_is_no_square_with_black(hps, images):
    wide = hps.prepare(pixels_of(images[0].resize((64, 32)))[None])
    black = -torch.tensor(hps_v2.MEAN) / torch.tensor(hps_v2.STD)
    assert wide.shape == (1, 3, 32, 32)
    torch.testing.assert_close(wide[0, :, 0, 0], black)
    torch.testing.assert_close(wide[0, :, -8:], black.view(3, 1, 1).expand(3, 8, 32))
    assert not torch.allclose(wide[0, :, 8], black.view(3, 1).expand(3, 32))


def test_hps_has_gradients(hps, images):
    pixels = torch.stack([pixels_of(image) for image in images]).requires_grad_()
    hps.score_pixels(pixels, PROMPTS, [{}] * 6).sum().backward()
    assert pixels.grad.isfinite().all() and (pixels.grad.flatten(1).norm(dim=1) > 0).all()
