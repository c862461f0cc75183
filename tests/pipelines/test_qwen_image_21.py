"""Qwen-Image-2.1: noise levels, a loss by hand, alpha, long prompts, the released width, adapter files, bad input."""

import numpy as np
import pytest
import released
import tiny
import torch
from diffusers import QwenImage21Transformer2DModel
from families import FAMILIES, pairs
from miniatures import qwen_image_21
from miniatures.requests import GUIDED, REQUEST, image, sampled
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from diffsynth.core.data import UnifiedDataset
from diffsynth.pipelines.networks.qwen_image_21 import QwenImage21Transformer
from diffsynth.pipelines.qwen_image_21 import MAX_POSITIONS, QwenImage21Pipeline
from diffsynth.training.checks import check_sides, scan

PLAIN, EDIT = (next(f for f in FAMILIES if f.name == name) for name in ("qwen_image_21", "qwen_image_21_edit"))
SEEN = image(3, (64, 64), "RGBA")
PARAMETERS = {"transformer": 7.115e9, "vae": 0.338e9, "text_encoder": 8.767e9}
BLOCK = "transformer_blocks.1.img_mlp"


def their_velocity(dit, images: list[Tensor], text: Tensor, lengths: list[int], sigma: Tensor) -> Tensor:
    """The velocity of diffusers' class, which gets text with a place for every 2 × 2 latent pixels of an image."""
    fresh = QwenImage21Transformer2DModel.from_config(dit.config)
    fresh.load_state_dict(dit.state_dict())
    counts = [latents.shape[2:].numel() // 4 for latents in images]
    runs = [*text.split(lengths, dim=1), text[:, :0]]
    slots = [torch.zeros(len(text), count, text.shape[2]) for count in [*counts[:-1], 0]]
    states = torch.cat([part for pair in zip(runs, [*slots, text[:, :0]], strict=True) for part in pair], dim=1)
    marks = [mark for length, count in zip(lengths, counts, strict=True) for mark in [False] * length + [True] * count]
    tokens = torch.cat([latents.flatten(2).transpose(1, 2) for latents in images], dim=1)
    shapes = [[(1, *latents.shape[2:]) for latents in images]] * len(text)
    found = fresh(tokens, states, sigma, shapes, torch.tensor([marks] * len(text)), return_dict=False)[0]
    size = images[-1].shape[2:]
    return found[:, -size.numel() :].transpose(1, 2).unflatten(2, size)


def test_noise_levels_are_the_released_ones():
    scheduler = qwen_image_21.build.scheduler()  # the configuration of Qwen-Image
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 40, 40), mu=0.5 + (4096 - 256) * 0.4 / (8192 - 256))
    pipe = QwenImage21Pipeline()
    pipe.set_timesteps(pipe.complete({"prompt": ""}))  # 40 steps at 1024²
    assert_close(pipe.scheduler.sigmas[:40], scheduler.sigmas[:40], atol=1e-6, rtol=0)
    assert pipe.call_defaults["cfg_scale"] == 1


def test_a_loss_is_the_one_by_hand():
    def velocity(dit, noisy, sigma, text):
        return their_velocity(dit, [noisy], text["prompt_emb"], *text["prompt_emb_lengths"], sigma)

    released.assert_loss_by_hand(PLAIN, velocity)


def test_training_images_keep_their_alpha_and_others_are_opaque(tmp_path):
    image(0, (64, 64), "RGBA").save(tmp_path / "a.png")
    image(0, (64, 64)).save(tmp_path / "b.png")
    (tmp_path / "metadata.csv").write_text("image,prompt\na.png,a\nb.png,b\n")
    rows = UnifiedDataset.from_folder(str(tmp_path))
    scan(rows, PLAIN.pipeline.media, PLAIN.task(), None)
    assert [row["image"].mode for row in rows] == ["RGBA", "RGBA"]
    (least, _), (opaque, _) = (row["image"].getchannel("A").getextrema() for row in rows)
    assert least < 200 and opaque == 255


def test_the_text_encoder_sees_images_on_white_and_the_transformer_their_alpha():
    pipe = EDIT.load()
    white = pipe.media.thumbnail(SEEN)
    found, flat = (pipe.prepare([REQUEST | {"edit_image": picture}]) for picture in (SEEN, white))
    assert_close(found[1]["prompt_emb"], flat[1]["prompt_emb"], atol=2e-2, rtol=0)  # rounded to 8 bits in another order
    assert (found[0]["edit_latents"][0] - flat[0]["edit_latents"][0]).abs().max() > 0.1


@pytest.mark.slow
def test_prompt_and_edit_images_change_the_latents():
    pipe = EDIT.load()
    base = GUIDED | {"edit_image": [SEEN]}
    other = image(4, (64, 64))
    changes = [{}, {"edit_image": None}, {"edit_image": [other]}, {"edit_image": [SEEN, other]}, {"prompt": "a"}]
    found = [sampled(pipe, base | change) for change in [*changes, {"edit_image": [other, SEEN]}]]
    assert min((a - b).abs().max() for number, a in enumerate(found) for b in found[:number]) > 1e-3


def test_the_end_of_a_prompt_that_is_too_long_is_cut_off():
    pipe = PLAIN.build()
    long = "red " * 8300
    (kept,) = pipe.tokenize(long, [])["kept"]
    ids = pipe.tokenize(long, [])["input_ids"][0]
    assert len(ids) - kept.start == 8191 and pipe.cuts_off(long) and not pipe.cuts_off("red " * 8000)
    assert torch.equal(ids[-4:], pipe.tokenize("red", [])["input_ids"][0, -4:])


def test_a_fused_layer_of_kohyas_programs_is_read_with_its_alpha(tmp_path):
    name = f"lora_unet_{BLOCK.replace('.', '_')}_gate_up"
    layers = f"{BLOCK}.gate_layer", f"{BLOCK}.proj"
    released.assert_kohyas_file_is_read(PLAIN.build(), name, *layers, folder=tmp_path)


@pytest.mark.slow
def test_diffusers_samples_an_exported_adapter(tmp_path):
    released.assert_diffusers_samples_an_export(PLAIN, tmp_path, strength=0.1)


@pytest.mark.parametrize("name", tiny.mostly_slow(PARAMETERS, "transformer"))
def test_the_released_networks_have_their_parameters(name):
    assert released.parameters("Qwen/Qwen-Image-2.1", name) == pytest.approx(PARAMETERS[name], abs=5e5)


@pytest.mark.slow
def test_a_block_of_the_released_width_has_diffusers_velocity():
    dit = released.with_random_weights(QwenImage21Transformer, num_layers=1)
    dit.pos_embed = type(dit.pos_embed)(10000, [16, 56, 56])
    dit.time_text_embed.time_proj.freqs = QwenImage21Transformer2DModel(num_layers=0).time_text_embed.time_proj.freqs
    dit.use_segments()
    images, text = [torch.randn(2, 64, *size) for size in ((2, 4), (4, 6))], torch.randn(2, 9, 4096)
    sigma = torch.tensor([0.5, 0.25])
    found = dit(images, text, [[3, 6]] * 2, sigma)
    assert_close(found, their_velocity(dit, images, text, [3, 6], sigma), atol=1e-4, rtol=1e-3)


CHANGED = {
    "dit has causal_condition=false in its config.json, expected true": {"causal_condition": False},
    "dit takes text embeddings of width 4096, but text_encoder makes 128": {"context_in_dim": 4096},
}


@pytest.mark.parametrize("message", CHANGED)
def test_a_transformer_of_another_kind_is_refused_before_weights_are_read(message, no_weights_are_read, tmp_path):
    with pytest.raises(ValueError, match=message):
        released.with_config(EDIT, "dit", tmp_path, **CHANGED[message]).load()


def test_a_transformer_of_another_family_is_refused_before_weights_are_read(no_weights_are_read):
    with pytest.raises(ValueError, match="QwenImage21Pipeline has no place for a QwenImageTransformer2DModel"):
        released.with_part(PLAIN, "dit", tiny.model() / "transformer").load()


def test_images_to_edit_need_a_processor():
    pipe = EDIT.build()
    pipe.processor = None
    with pytest.raises(ValueError, match="edit_image needs a processor, .* model.processor is null"):
        pipe.tokenize("a", [SEEN])


def test_sides_that_are_no_multiples_of_32_are_refused_before_the_training():
    rows = UnifiedDataset.from_folder(str(pairs()), "metadata.jsonl", height=48, width=64)
    with pytest.raises(ValueError, match="images have 64 x 48 pixels, expected multiples of 32"):
        check_sides(rows, PLAIN.pipeline.latents.multiple)


def test_an_image_to_edit_takes_as_many_positions_as_its_longer_side():
    pipe = EDIT.build()
    for size in ((64, 96), (96, 64)):
        tokens = pipe.tokenize("red " * 9000, [Image.new("RGBA", size)])
        first, rest = tokens["kept"]
        text = tokens["input_ids"].shape[1] - first.start - (rest.start - first.stop)
        assert text == MAX_POSITIONS - 96 // 16
