from base64 import b64decode
from importlib import metadata

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import EMBEDDED
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from diffsynth.core.data import collate
from diffsynth.diffusion.base_pipeline import PipelineUnit
from diffsynth.diffusion.loss import FlowMatchSFT
from diffsynth.diffusion.pipeline.attention import rotated, rotation_table
from diffsynth.diffusion.pipeline.units import run_units
from diffsynth.pipelines.qwen_image import (
    PROMPT_TEMPLATE_TOKENS,
    ModelConfig,
    QwenImagePipeline,
    QwenImageVAE,
    pack_latents,
    unpack_latents,
)

REQUEST = {
    "prompt": "a red apple",
    "negative_prompt": "a line emoji of an umbrella",
    "height": 48,
    "width": 64,
    "seed": 1,
    "num_inference_steps": 4,
    "cfg_scale": 3.0,
}


def latents_of(pipe, **changes):
    """The latents that a call ends with."""
    pipe.decode = lambda latents, request: latents
    return pipe(**{**REQUEST, **changes})


def inputs_of(pipe, **changes):
    """What the units make of a request, as three dictionaries."""
    request = {**pipe.call_defaults, **REQUEST, **changes}
    pipe.set_timesteps(request)
    with torch.no_grad():
        return run_units(pipe.units, pipe, *pipe.split_request(request))


def sampled_by_diffusers(folder, output_type, cfg_scale=REQUEST["cfg_scale"]):
    pipe = diffusers.QwenImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn((1, 16, 6, 8), generator=torch.Generator().manual_seed(REQUEST["seed"]))
    given = {name: REQUEST[name] for name in ("prompt", "height", "width", "num_inference_steps")}
    given["negative_prompt"] = REQUEST["negative_prompt"] if cfg_scale > 1 else None
    return pipe(**given, true_cfg_scale=cfg_scale, latents=pack_latents(noise), output_type=output_type).images[0]


def picture(seed, size=(64, 48)):
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


# The released model's results ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_latents_are_those_of_diffusers(repository, load_pipe, cfg_scale):
    found = latents_of(load_pipe(repository), cfg_scale=cfg_scale)
    expected = sampled_by_diffusers(repository, "latent", cfg_scale)
    torch.testing.assert_close(pack_latents(found)[0], expected, atol=1e-4, rtol=0)


def test_image_is_that_of_diffusers(repository, load_pipe):
    found, expected = load_pipe(repository)(**REQUEST), sampled_by_diffusers(repository, "pil")
    assert found.size == expected.size == (64, 48)
    np.testing.assert_allclose(np.array(found, dtype=int), np.array(expected, dtype=int), atol=1)  # one grey level


def test_prompt_negative_prompt_and_guidance_matter(pipe):
    """Else the comparison with diffusers would show little."""
    expected = latents_of(pipe)
    for change in ({"prompt": "a rocket"}, {"negative_prompt": ""}, {"cfg_scale": 2.0}, {"cfg_rescale": False}):
        assert (latents_of(pipe, **change) - expected).abs().max() > 1e-2, change


def test_a_model_that_predicts_nothing_leaves_the_noise(pipe):
    pipe.dit.proj_out.requires_grad_(False).weight.zero_()
    pipe.dit.proj_out.bias.zero_()
    noise = torch.randn((1, 16, 6, 8), generator=torch.Generator().manual_seed(REQUEST["seed"]))
    torch.testing.assert_close(latents_of(pipe), noise)


def test_a_block_of_the_released_width_denoises_as_in_diffusers():
    torch.manual_seed(0)
    with torch.device("meta"):
        dit = diffusers.QwenImageTransformer2DModel(num_layers=1)
    rotary = diffusers.QwenImageTransformer2DModel(num_layers=0).pos_embed  # plain tensors, which meta has emptied
    dit = dit.to_empty(device="cpu").requires_grad_(False)
    dit.pos_embed = rotary
    for parameter in dit.parameters():
        parameter.normal_(std=0.02)
    text, negative_text, noise = torch.randn(1, 7, 3584), torch.randn(1, 4, 3584), torch.randn(1, 16, 8, 8)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    theirs = diffusers.QwenImagePipeline(scheduler, None, None, None, dit)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        prompt_embeds=text,
        negative_prompt_embeds=negative_text,
        true_cfg_scale=4.0,
        latents=pack_latents(noise),
        height=64,
        width=64,
        num_inference_steps=2,
        output_type="latent",
    ).images

    pipe = QwenImagePipeline(torch_dtype=torch.float32)
    pipe.dit, pipe.progress_bar = dit, iter
    pipe.scheduler.set_timesteps(2, dynamic_shift_len=16)
    posi, nega = ({"prompt_emb": t, "prompt_emb_mask": torch.ones(t.shape[:2]).bool()} for t in (text, negative_text))
    found = pipe.denoise({"latents": noise, "cfg_scale": 4.0}, posi, nega)
    assert (found - noise).abs().max() > 1e-2
    torch.testing.assert_close(pack_latents(found), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("change", [{"num_inference_steps": 3}, {"cfg_scale": 1.0}, {"height": 64}])
def test_requests_that_cannot_share_a_batch_are_refused(pipe, change):
    with pytest.raises(ValueError, match=f"batch differ in .'{next(iter(change))}'"):
        pipe.generate([REQUEST, {**REQUEST, **change}])


def test_packing_and_unpacking_undo_each_other():
    latents = torch.randn(2, 16, 6, 8)
    theirs = diffusers.QwenImagePipeline._pack_latents(latents.unsqueeze(2), 2, 16, 6, 8)
    torch.testing.assert_close(pack_latents(latents), theirs, atol=0, rtol=0)
    torch.testing.assert_close(unpack_latents(pack_latents(latents), 6, 8), latents, atol=0, rtol=0)


# Tokenizer -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pipe_with_released_tokenizer(tmp_path_factory):
    """A pipeline with the released vocabulary, read from the file that the package dashscope carries."""
    try:
        file = metadata.distribution("dashscope").locate_file("dashscope/resources/qwen.tiktoken")
    except metadata.PackageNotFoundError:
        pytest.skip('needs the released vocabulary: pip install "diffsynth-hydra[test]"')
    letters = bytes_to_unicode()
    lines = [line.split() for line in file.read_text().splitlines()]
    ranks = {"".join(letters[byte] for byte in b64decode(token)): int(rank) for token, rank in lines}
    splits = ((token[:cut], token[cut:]) for token in ranks for cut in range(1, len(token)))  # in order of rank
    tokenizer = Qwen2Tokenizer(vocab=ranks, merges=[(a, b) for a, b in splits if a in ranks and b in ranks])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    pipe = QwenImagePipeline()
    pipe.build_folder("tokenizer", ModelConfig(path=folder))
    return pipe


@pytest.mark.parametrize("prompt", ["a red apple", "一只戴帽子的猫，写着 “Qwen”", "  two  spaces\n\nand 1234"])
def test_what_is_left_of_the_template_begins_with_the_prompt(pipe_with_released_tokenizer, prompt):
    pipe = pipe_with_released_tokenizer
    ids = pipe.tokenize(prompt).input_ids[0].tolist()
    assert ids[:5] == [151644, 8948, 198, 74785, 279]  # <|im_start|>, system, newline, Describe, the
    kept = ids[PROMPT_TEMPLATE_TOKENS:]
    expected = pipe.tokenizer(prompt).input_ids
    assert kept == [*expected, 151645, 198, 151644, 77091, 198]  # <|im_end|>, newline, <|im_start|>, assistant, newline
    assert pipe.tokenizer.decode(expected) == prompt


def test_prompts_are_cut_at_1024_tokens(pipe_with_released_tokenizer):
    tokens = pipe_with_released_tokenizer.tokenize("apple " * 2000)
    assert tokens.input_ids.shape == tokens.attention_mask.shape == (1, PROMPT_TEMPLATE_TOKENS + 1024)


def test_a_tokenizer_that_cuts_the_template_elsewhere_is_refused(tmp_path):
    vocabulary = {letter: index for index, letter in enumerate(bytes_to_unicode().values())}
    Qwen2Tokenizer(vocab=vocabulary, merges=[]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokens of the prompt template, expected 34"):
        QwenImagePipeline().build_folder("tokenizer", ModelConfig(path=tmp_path))


# Images in -----------------------------------------------------------------------------------------------------------


def test_noise_is_that_of_the_original_seed():
    """Sampled in bf16 on the CPU, as in the original, so that a seed gives the picture it gives there."""
    pipe = QwenImagePipeline(torch_dtype=torch.bfloat16)
    noise = pipe.units[1].process(pipe, height=48, width=64, seed=7, rand_device="cpu")["noise"]
    expected = torch.randn((1, 16, 6, 8), generator=torch.Generator("cpu").manual_seed(7), dtype=torch.bfloat16)
    assert torch.equal(noise, expected)


def test_sizes_are_rounded_up_to_16_pixels(pipe):
    assert pipe(**{**REQUEST, "height": 33, "width": 49, "num_inference_steps": 1}).size == (64, 48)


def test_a_weaker_denoising_stays_nearer_to_the_input_image(pipe):
    encoded = pipe.vae.encode(pipe.preprocess_image(picture(0)))
    distances = [
        (latents_of(pipe, input_image=picture(0), denoising_strength=strength) - encoded).norm()
        for strength in (0.05, 0.4, 1.0)
    ]
    assert distances == sorted(distances)


def test_an_input_image_is_resized_to_what_is_sampled(pipe):
    shared, _, _ = inputs_of(pipe, input_image=picture(0, size=(90, 30)))
    assert shared["input_latents"].shape == (1, 16, 6, 8)


def test_a_blurred_mask_fades_between_both(pipe):
    mask = Image.new("L", (64, 48))
    mask.paste(255, (32, 0, 64, 48))
    shared, _, _ = inputs_of(pipe, input_image=picture(0), inpaint_mask=mask, inpaint_blur_sigma=1.0)
    row = shared["inpaint_mask"][0, 0, 3]
    assert (row.diff() >= 0).all() and 0 < row[3] < 0.5 < row[4] < 1


# Autoencoder ---------------------------------------------------------------------------------------------------------


def test_one_frame_goes_through_2d_convolutions_as_through_3d(tiny):
    pixels, latents = torch.rand(2, 3, 48, 64) * 2 - 1, torch.randn(2, 16, 6, 8)
    plain = QwenImageVAE.from_pretrained(tiny / "vae").requires_grad_(False)
    encoded, decoded = plain.encode(pixels), plain.decode(latents)
    plain.use_single_frame_convolutions()
    torch.testing.assert_close(plain.encode(pixels), encoded, atol=1e-5, rtol=0)
    torch.testing.assert_close(plain.decode(latents), decoded, atol=1e-5, rtol=0)


def test_latents_are_normalised_by_the_released_statistics(tiny, pipe):
    plain = diffusers.AutoencoderKLQwenImage.from_pretrained(tiny / "vae").requires_grad_(False)
    pixels = torch.rand(1, 3, 48, 64) * 2 - 1
    mean, std = (torch.tensor(plain.config[f"latents_{name}"]).view(1, 16, 1, 1) for name in ("mean", "std"))
    expected = (plain.encode(pixels.unsqueeze(2)).latent_dist.mean[:, :, 0] - mean) / std
    torch.testing.assert_close(pipe.vae.encode(pixels), expected, atol=1e-5, rtol=0)


def test_tiles_are_close_to_the_whole_image(load_pipe):
    pipe = load_pipe(EMBEDDED)  # what a random autoencoder makes of a place depends on places far away
    emoji = Image.open(EMBEDDED.parents[1] / "data" / "emoji" / "color" / "rocket.webp").resize((128, 96))
    pixels = pipe.preprocess_image(emoji)
    latents = pipe.vae.encode(pixels)
    tiles = {"tiled": True, "tile_size": 8, "tile_stride": 6}
    for run, whole in ((pipe.vae.encode, pixels), (pipe.vae.decode, latents)):
        expected, found = run(whole), run(whole, **tiles)
        assert found.shape == expected.shape
        assert 0 < (found - expected).norm() < 0.5 * (expected - expected.mean()).norm()


# Units ---------------------------------------------------------------------------------------------------------------


def test_the_unit_printed_in_the_guide_to_training_takes_the_place_of_ours(pipe):
    class QwenImageUnit_InputImageEmbedder(PipelineUnit):
        def __init__(self):
            super().__init__(
                input_params=("input_image", "noise", "tiled", "tile_size", "tile_stride"),
                output_params=("latents", "input_latents"),
                onload_model_names=("vae",)
            )  # fmt: skip

        def process(self, pipe: QwenImagePipeline, input_image, noise, tiled, tile_size, tile_stride):
            if input_image is None:
                return {"latents": noise, "input_latents": None}
            pipe.load_models_to_device(['vae'])  # fmt: skip
            image = pipe.preprocess_image(input_image).to(device=pipe.device, dtype=pipe.torch_dtype)
            input_latents = pipe.vae.encode(image, tiled=tiled, tile_size=tile_size, tile_stride=tile_stride)
            if pipe.scheduler.training:
                return {"latents": noise, "input_latents": input_latents}
            else:
                latents = pipe.scheduler.add_noise(input_latents, noise, timestep=pipe.scheduler.timesteps[0])
                return {"latents": latents, "input_latents": input_latents}

    requests = [{"input_image": picture(0), "denoising_strength": 0.7}, {}]
    expected = [latents_of(pipe, **request) for request in requests]
    pipe.units = [
        QwenImageUnit_InputImageEmbedder() if type(unit).__name__ == "InputImageEmbedder" else unit
        for unit in pipe.units
    ]
    for request, latents in zip(requests, expected, strict=True):
        torch.testing.assert_close(latents_of(pipe, **request), latents, atol=0, rtol=0)


def test_training_the_transformer_needs_no_inpainting_unit(pipe):
    units = FlowMatchSFT().units(pipe)
    names = [type(unit).__name__.rpartition("_")[2] for unit in units]
    assert names == ["ShapeChecker", "NoiseInitializer", "InputImageEmbedder", "PromptEmbedder"]


def test_an_unknown_argument_is_answered_with_the_nearest(pipe):
    with pytest.raises(ValueError, match=r"no argument 'promt'; did you mean 'prompt'\?"):
        pipe.generate([{**REQUEST, "promt": ""}])


@pytest.mark.parametrize(("second", "is_padded"), [("a red car", False), ("a", True)])
def test_attention_has_a_mask_only_where_a_prompt_is_padded(second, is_padded, pipe, monkeypatch):
    """With a mask, flash attention is out."""
    masks, attend = [], F.scaled_dot_product_attention

    def record(*args, attn_mask=None, **options):
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **options)

    requests = [{**REQUEST, "prompt": prompt, "num_inference_steps": 1} for prompt in ("a red fox", second)]
    shared, posi, nega = pipe.prepare(requests)
    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    pipe.denoise(shared, posi, nega)
    of_positive, of_negative = masks[: len(masks) // 2], masks[len(masks) // 2 :]
    assert len(masks) == 2 * len(pipe.dit.transformer_blocks) and set(of_negative) == {None}
    if is_padded:
        text = posi["prompt_emb_mask"]
        assert not text[1].all() and all(torch.equal(mask[:, 0, 0, : text.shape[1]], text) for mask in of_positive)
    else:
        assert posi["prompt_emb_mask"] is None and set(of_positive) == {None}


class NoComplex(TorchDispatchMode):
    """Refuses operations on complex numbers, for which inductor makes no code."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        assert not any(isinstance(t, torch.Tensor) and t.is_complex() for t in tree_leaves((args, kwargs, found))), func
        return found


def test_a_block_compiles_to_one_graph_without_complex_numbers(pipe):
    block, calls = pipe.dit.transformer_blocks[1], []
    with block.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True):
        latents_of(pipe, num_inference_steps=1)
    with NoComplex(), torch.no_grad():
        text, image = block(**calls[0])
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(**calls[0])
    torch.compiler.reset()
    torch.testing.assert_close(compiled, (text, image))


def test_rotation_in_real_numbers_is_diffusers_to_the_bit():
    heads = torch.randn(2, 5, 3, 16, requires_grad=True)
    frequencies = torch.polar(torch.ones(5, 8), 50 * torch.randn(5, 8))
    expected, found = (
        apply_rotary_emb_qwen(heads, frequencies, use_real=False),
        rotated(heads, rotation_table(frequencies)),
    )
    gradients = [torch.autograd.grad(made.square().sum(), heads)[0] for made in (expected, found)]
    assert torch.equal(found, expected) and torch.equal(*gradients)


def test_padding_of_the_text_does_not_reach_the_image(pipe):
    """A sample alone is computed without a mask, so its company must not matter."""
    short, long = (inputs_of(pipe, prompt=prompt)[1] for prompt in ("", "a line emoji of a tiger face"))
    text, latents = collate([short, long]), torch.randn(2, 16, 6, 8)
    assert text["prompt_emb_mask"].sum(1).tolist() == [short["prompt_emb"].shape[1], long["prompt_emb"].shape[1]]
    with torch.no_grad():
        together = pipe.predict(torch.tensor([900.0, 100]), latents=latents, **text)
        alone = [
            pipe.predict(torch.tensor([t]), latents=x.unsqueeze(0), **one)
            for t, x, one in ((900.0, latents[0], collate([short])), (100.0, latents[1], collate([long])))
        ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
