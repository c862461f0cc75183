"""The embedded Wan before it is trained: its size, its tokenizer, and the autoencoder that it begins with."""

from itertools import islice
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoTokenizer

from data.emoji.build_motions import MOTIONS, NEW_MOTIONS, Pose, clip, frame, read_image
from diffsynth.diffusion.pipeline.video_media import VideoMedia
from diffsynth.pipelines.autoencoders.wan import WanVAE
from diffsynth.pipelines.qwen_image import QwenImageVAE
from models.emoji_wan import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("emoji_wan")
    build.init(str(root))
    return root


@pytest.fixture(scope="module")
def vae(folder) -> WanVAE:
    return WanVAE.from_pretrained(folder / "vae").eval()


def pixels(frames) -> torch.Tensor:
    return VideoMedia().preprocess(frames, torch.device("cpu"), torch.float32)


def test_its_weights_are_the_same_each_time(folder, tmp_path):
    build.init(str(tmp_path))
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*.safetensors"))]
    assert len(files) == 3
    for file in files:
        first, second = load_file(folder / file), load_file(tmp_path / file)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_its_files_take_12_megabytes_in_bf16(folder):
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    assert sum(sizes) / 2 < 12e6


def test_diffusers_loads_it(folder):
    pipe = diffusers.WanPipeline.from_pretrained(folder)
    assert pipe.transformer.config.text_dim == pipe.text_encoder.config.d_model
    assert pipe.vae_scale_factor_spatial == 8 and pipe.vae_scale_factor_temporal == 4


@pytest.mark.parametrize("prompt", ["a color emoji of snow-capped mountain", "a vivid emoji of t-rex"])
@pytest.mark.parametrize("motion", [*MOTIONS, *NEW_MOTIONS])
def test_each_word_of_a_caption_is_one_token(folder, prompt, motion):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer(f"{prompt} {motion}").input_ids
    assert len(ids) == len(f"{prompt} {motion}".split()) + 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids


def test_words_of_no_caption_are_spelled(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert tokenizer("emoji wobbles!").tokens() == ["▁emoji", "▁", *"wobbles!", "</s>"]


@torch.no_grad()
def test_its_autoencoder_begins_as_that_of_the_images(vae):
    images = QwenImageVAE.from_pretrained(tiny.ROOT / "models/emoji/vae").float().eval()
    still = frame(read_image("rocket"), Pose())
    one = pixels([still])
    assert_close(vae.distribution(one).mean, images.distribution(one[:, :, 0]).mean, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_its_autoencoder_begins_with_every_fourth_frame(vae):
    frames = clip(read_image("rocket"), MOTIONS["moves left"])
    latents = vae.distribution(pixels(frames)).mean
    single = [vae.distribution(pixels([frames[number]])).mean for number in (0, 4, 8)]
    assert_close(latents, torch.cat(single, dim=2), atol=1e-4, rtol=1e-4)
    decoded, shown = vae.reconstruct(latents), [vae.reconstruct(each) for each in single]
    expected = torch.cat([shown[0], *[shown[1]] * 4, *[shown[2]] * 4], dim=2)
    assert_close(decoded, expected, atol=1e-3, rtol=1e-3)


def test_videos_are_the_clips_of_a_table():
    (batch,) = islice(build.videos("motion_held_out.csv"), 1)
    assert batch.shape == (build.CLIPS_AT_ONCE, 3, 9, 64, 64) and batch.min() >= -1 and batch.max() == 1
    assert (build.psnr(batch, batch + 0.02) - 40).abs().max() < 1e-3
