"""FLUX.2: what the released pipelines sample, editing, training in batches and in two stages, the released sizes."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny
import tiny_flux2
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from test_qwen_image import picture
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffsynth.core.data import Sample, SampleAddress
from diffsynth.core.data.dataset import Row
from diffsynth.core.loader import build_module
from diffsynth.diffusion.adapters.lora import LoRA, find_layers
from diffsynth.diffusion.loss import AutoencoderLoss, FlowMatchSFT
from diffsynth.diffusion.pipeline.image_units import edit_images
from diffsynth.diffusion.pipeline.units import run_units
from diffsynth.diffusion.randomness import SampleRNG
from diffsynth.diffusion.training_module import PipelineTrainingModule, prepare_training
from diffsynth.pipelines import flux2_image
from diffsynth.pipelines.flux2_image import TEXT_DEPTHS, Flux2ImagePipeline, Flux2VAE, ModelConfig
from diffsynth.pipelines.shared.flux import text_depths, text_embeddings
from models.emoji.build import captions

EMBEDDED = Path(__file__).parents[2] / "models" / "emoji_flux2"
REQUEST = {"prompt": "a red apple", "height": 48, "width": 64, "seed": 1, "num_inference_steps": 4}
NOISE = torch.randn((1, 128, 3, 4), generator=torch.Generator().manual_seed(1))
EDITS = {"none": None, "one": picture(3, (64, 64)), "two": [picture(3, (64, 64)), picture(4, (96, 64))]}
ADAPTER = LoRA(rank=2, target_modules=["to_q", "add_k_proj", "to_qkv_mlp_proj", "to_out"])


@pytest.fixture
def pipe():
    """Klein in miniature with random weights, fresh in each test."""
    return loaded(tiny_flux2.klein())


def loaded(folder: Path, **options) -> Flux2ImagePipeline:
    pipe = tiny_flux2.pipeline(folder, **options)
    pipe.load_models()
    return pipe


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


class CopiesFromHost(TorchDispatchMode):
    """Names of the operations that read a tensor of the CPU and write one of another device; meta stands for a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        if "cpu" in devices and isinstance(found, torch.Tensor) and found.is_meta:
            self.names.append(str(func))
        return found


@pytest.mark.parametrize("guidance", [4.0, [4.0, 2.0]])
def test_the_network_waits_for_no_copy_from_the_host(pipe, guidance, monkeypatch):
    """A plain copy to a GPU makes the CPU wait until the GPU has done all its work."""
    arrived = []  # torch shows no copy of Python's numbers, so that those of `sent` are counted
    monkeypatch.setattr(
        flux2_image, "sent", lambda tensor, to: arrived.append(torch.empty(tensor.shape, device=to)) or arrived[-1]
    )
    dit, width = pipe.dit.to("meta"), pipe.dit.config.joint_attention_dim
    latents, text, timestep = (torch.empty(*shape, device="meta") for shape in ((2, 128, 3, 4), (2, 5, width), (2,)))
    with CopiesFromHost() as copies, torch.no_grad():
        flux2_image.model_fn_flux2(dit, latents, timestep, text, [latents], embedded_guidance=guidance)
    assert copies.names == [] and len(arrived) == 3


# The released models' results -----------------------------------------------------------------------------------------


def sampled_by_diffusers(folder, output_type, edit_image=None, guidance=1.0):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        edit_image,
        **{name: value for name, value in REQUEST.items() if name != "seed"},
        guidance_scale=guidance,
        latents=NOISE,
        max_sequence_length=tiny_flux2.DEV_TOKENS if folder.name == "dev" else tiny_flux2.MAX_TOKENS,
        text_encoder_out_layers=(1, 2, 3),
        output_type=output_type,
    ).images


@pytest.mark.parametrize("edit_image", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("folder", [tiny_flux2.klein, lambda: EMBEDDED], ids=["random", "embedded"])
def test_klein_samples_the_latents_that_diffusers_does(folder, edit_image, guidance):
    pipe = loaded(folder())
    found = latents_of(pipe, cfg_scale=guidance, edit_image=edit_image, edit_image_auto_resize=False)
    bn = pipe.vae.bn
    scale, shift = ((s.view(1, -1, 1, 1)) for s in ((bn.running_var + 1e-4).sqrt(), bn.running_mean))
    expected = sampled_by_diffusers(folder(), "latent", edit_image, guidance)
    assert_close(F.pixel_shuffle(found * scale + shift, 2), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("edit_image", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_dev_samples_the_latents_that_diffusers_does(edit_image, guidance):
    options = {"embedded_guidance": guidance, "edit_image": edit_image, "edit_image_auto_resize": False}
    found = latents_of(loaded(tiny_flux2.dev()), **options)
    expected = sampled_by_diffusers(tiny_flux2.dev(), "latent", edit_image, guidance)
    assert_close(found.flatten(2).transpose(1, 2), expected, atol=1e-4, rtol=0)


def test_an_image_is_that_of_diffusers(pipe):
    found, expected = pipe(**REQUEST), sampled_by_diffusers(tiny_flux2.klein(), "pil")[0]
    assert found.size == expected.size == (64, 48)
    np.testing.assert_allclose(np.array(found, dtype=int), np.array(expected, dtype=int), atol=1)  # one grey level


def test_prompt_guidance_and_edit_images_change_the_latents():
    """Else the comparisons with diffusers would show little."""
    klein, dev = loaded(tiny_flux2.klein()), loaded(tiny_flux2.dev())
    changes = [{"prompt": "a rocket"}, {"cfg_scale": 2.0}, {"cfg_scale": 2.0, "negative_prompt": "a rocket"}]
    sampled = [
        latents_of(klein, **change) for change in [{}, *changes, *({"edit_image": e} for e in EDITS.values() if e)]
    ]
    sampled_by_dev = [latents_of(dev, **change) for change in ({}, {"prompt": "a rocket"}, {"embedded_guidance": 1.0})]
    for several in (sampled, sampled_by_dev):
        pairs = [(a - b).abs().max() for number, a in enumerate(several) for b in several[:number]]
        assert min(pairs) > 1e-2


def test_blocks_of_the_released_width_denoise_as_in_diffusers():
    torch.manual_seed(0)
    with torch.device("meta"):
        dit = diffusers.Flux2Transformer2DModel(
            num_layers=1, num_single_layers=1, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        )
    dit = dit.to_empty(device="cpu").requires_grad_(False)
    for parameter in dit.parameters():
        parameter.normal_(std=0.02)
    text, noise = torch.randn(1, 7, 7680), torch.randn(1, 128, 4, 4)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    theirs = diffusers.Flux2KleinPipeline(scheduler, None, None, None, dit)
    theirs.set_progress_bar_config(disable=True)
    theirs.vae = Flux2VAE.from_pretrained(tiny_flux2.klein() / "vae")  # whose statistics it undoes
    request = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    expected = F.pixel_unshuffle(theirs(prompt_embeds=text, latents=noise, **request).images, 2)

    pipe = Flux2ImagePipeline(torch_dtype=torch.float32)
    pipe.dit, pipe.progress_bar = dit, iter
    pipe.scheduler.set_timesteps(2, dynamic_shift_len=16)
    found = pipe.denoise({"latents": noise, "cfg_scale": 1.0}, {"prompt_emb": text}, {})
    assert (found - noise).abs().max() > 1e-2
    mean, std = theirs.vae.statistics(found)
    assert_close(found, (expected - mean) / std, atol=1e-4, rtol=0)


# The text encoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repository", [tiny_flux2.klein, tiny_flux2.dev])
def test_no_layer_above_three_quarters_is_run(repository):
    pipe = loaded(repository())
    decoder = pipe.text_encoder.get_decoder()
    tokens = [pipe.tokenize(prompt, tiny_flux2.DEV_TOKENS) for prompt in ("a red apple", "")]
    ids, mask = (torch.cat([part[name] for part in tokens]) for name in ("input_ids", "attention_mask"))
    whole = decoder(ids, mask, output_hidden_states=True).hidden_states
    for module in (decoder.layers[3], *([pipe.text_encoder.lm_head])):
        module.register_forward_pre_hook(lambda *_: pytest.fail("is run"))
    found = text_embeddings(decoder, TEXT_DEPTHS, input_ids=ids, attention_mask=mask)
    assert torch.equal(found, torch.cat(whole[1:4], dim=2))
    assert decoder.config.num_hidden_layers == 4 and len(decoder.layers) == 4


def test_a_prompt_is_cut_off_where_its_tokens_end(pipe):
    assert pipe.cuts_off("a red apple " * 5) and not pipe.cuts_off("a red apple")
    long, longer = (inputs_of(pipe, prompt="a red apple " * n)[1]["prompt_emb"] for n in (8, 9))
    assert torch.equal(long, longer) and long.shape == (1, 24, 384)
    assert inputs_of(pipe, max_sequence_length=40)[1]["prompt_emb"].shape == (1, 40, 384)


def test_all_embedded_captions_fit(pipe):
    assert not any(pipe.cuts_off(prompt) for prompt in {*captions("color_captions.csv"), *captions("all_train.csv")})
    assert OmegaConf.load(tiny.ROOT / "conf/model/emoji_flux2.yaml").max_sequence_length == tiny_flux2.MAX_TOKENS


# Images ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, resized", [((640, 640), (64, 64)), ((96, 32), (96, 32)), ((300, 100), (96, 32))])
def test_edit_images_keep_their_proportions_at_the_models_area(pipe, size, resized):
    shared, _, _ = inputs_of(pipe, edit_image=picture(0, size))
    (latents,) = shared["edit_latents"]
    assert latents.shape == (1, 128, resized[1] // 16, resized[0] // 16)


def test_a_released_model_edits_at_a_megapixel():
    (image,) = edit_images(picture(0, (640, 480)), True, Flux2ImagePipeline().call_defaults["edit_image_pixels"])
    assert image.size == (1184, 896)


def test_latents_are_normalised_as_the_batch_norm_does(pipe):
    pixels = torch.rand(2, 3, 48, 64) * 2 - 1
    with torch.no_grad():
        expected = pipe.vae.bn(F.pixel_unshuffle(pipe.vae.distribution(pixels).mean, 2))
        found = pipe.vae.encode(pixels)
        assert found.shape == (2, 128, 3, 4)
        assert_close(found, expected, atol=1e-5, rtol=0)
        assert_close(
            pipe.vae.decode(found), pipe.vae.reconstruct(pipe.vae.distribution(pixels).mean), atol=1e-4, rtol=0
        )


def test_tiles_are_close_to_the_whole_image(pipe):
    pixels, tiles = pipe.preprocess_image(picture(0, (128, 96))), {"tiled": True, "tile_size": 8, "tile_stride": 4}
    latents = pipe.vae.encode(pixels)
    for run, whole in ((pipe.vae.encode, pixels), (pipe.vae.decode, latents)):
        expected, found = run(whole), run(whole, **tiles)
        assert found.shape == expected.shape and (found - expected).abs().max() > 0
        assert torch.equal(run(whole, tiled=True), expected)  # one tile as large as the image


# Training -------------------------------------------------------------------------------------------------------------


def training(task=None, lora=None, **options) -> PipelineTrainingModule:
    """A training whose models are built, not loaded."""
    return PipelineTrainingModule(tiny_flux2.pipeline(**options), task or FlowMatchSFT(), lora)


def edited(count: int = 3) -> list[Sample]:
    """Pictures of 32 x 48 pixels, each with two images of other shapes to edit."""
    rows = [{"image": picture(n, (32, 48)), "prompt": "red " * n} for n in range(count)]
    edits = [[picture(9 + n, (64, 64)), picture(19 + n, (96, 48))] for n in range(count)]
    return [Sample(Row({**r, "edit_image": e}), n, 10 + n) for n, (r, e) in enumerate(zip(rows, edits, strict=True))]


def gradients(module, batches):
    module.zero_grad()
    loss = torch.cat([module(batch) for batch in batches]).mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


EDITING = FlowMatchSFT(extra_inputs=["edit_image"])
EVERYTHING = FlowMatchSFT(trainable_models=["dit", "text_encoder"], extra_inputs=["edit_image"])


def test_gradients_reach_all_that_is_trained_but_what_is_never_run():
    module = training(EVERYTHING).load()
    _, reached = gradients(module, [edited()])
    never_run = ("pipe.text_encoder.model.layers.3.", "pipe.text_encoder.model.norm.")
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained - reached.keys() == {name for name in trained if name.startswith(never_run)}


def test_the_edit_images_of_a_batch_must_be_equally_many(pipe):
    module, (one, two, _) = training(EDITING, ADAPTER).load(), edited()
    one.data["edit_image"] = one.data["edit_image"][0]
    with pytest.raises(ValueError, match=r"edit_latents: .* hold \[1, 2\] tensors; set micro_batch_size=1"):
        module([one, two])


def test_a_mask_of_the_loss_has_a_weight_a_latent_pixel():
    module, samples = training(FlowMatchSFT(extra_inputs=["loss_mask"]), ADAPTER).load(), edited()
    whole, halves = training(lora=ADAPTER).load()(samples), []
    for top, bottom in ((255, 0), (0, 255)):
        mask = Image.fromarray(np.repeat([top, bottom], [16, 32]).astype(np.uint8)[:, None].repeat(32, 1))
        halves.append(module([sample._replace(data=Row({**sample.data, "loss_mask": mask})) for sample in samples]))
    assert_close((halves[0] + 2 * halves[1]) / 3, whole, atol=1e-5, rtol=1e-5)


def test_the_embedded_guidance_of_a_training_is_one_unless_the_rows_say_so():
    dev, samples = tiny_flux2.dev(), edited()
    said = [
        sample._replace(data=Row({**sample.data, "embedded_guidance": scale}))
        for sample, scale in zip(samples, (1.0, 1.0, 4.0), strict=True)
    ]
    with torch.no_grad():
        silent, told = (
            training(FlowMatchSFT(extra_inputs=extra), ADAPTER, folder=dev).load()(rows)
            for extra, rows in (([], samples), (["embedded_guidance"], said))
        )
    assert_close(told[:2], silent[:2])
    assert (told[2] - silent[2]).abs() > 1e-5


def test_the_autoencoders_loss_needs_no_other_model():
    module, samples = training(AutoencoderLoss(kl_weight=0.1)).load(), edited()
    assert module.pipe.dit is None and module.pipe.text_encoder is None
    vae, pixels = module.pipe.vae, torch.cat([module.pipe.preprocess_image(s.data["image"]) for s in samples])
    before = vae.bn.running_mean.clone()
    posterior = vae.distribution(pixels)
    error = pixels - vae.reconstruct(posterior.mean)
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1))
    expected = error.abs().mean((1, 2, 3)) + error.pow(2).mean((1, 2, 3)) + 0.1 * kl.mean((1, 2, 3))
    assert_close(module(samples), expected)
    assert torch.equal(vae.bn.running_mean, before)


# Runs -----------------------------------------------------------------------------------------------------------------


def train(folder: Path, *changes: str) -> Path:
    return tiny.train(folder, *tiny.merged(tiny_flux2.overrides(), changes))


def test_a_run_trains_an_adapter_that_diffusers_loads(pipe, tmp_path):
    run_dir = train(tmp_path, "optimizer.lr=0.05")
    (file,) = (run_dir / "weights").glob("*.safetensors")
    keys = list(load_file(file))
    for layer in ("transformer_blocks.0.ff_context.linear_in", "single_transformer_blocks.3.attn.to_out"):
        assert f"transformer.{layer}.lora_A.weight" in keys
    base = latents_of(pipe)
    pipe.load_lora("dit", file)
    found = latents_of(pipe)
    assert (found - base).abs().max() > 0.02
    theirs = diffusers.Flux2KleinPipeline.from_pretrained(tiny_flux2.klein(), dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(file)
    request = {name: value for name, value in REQUEST.items() if name != "seed"}
    tokens = {"max_sequence_length": tiny_flux2.MAX_TOKENS, "text_encoder_out_layers": (1, 2, 3)}
    latents = theirs(**request, **tokens, guidance_scale=1.0, latents=NOISE, output_type="latent").images
    mean, std = pipe.vae.statistics(found)
    assert_close(found, (F.pixel_unshuffle(latents, 2) - mean) / std, atol=5e-4, rtol=0)


@pytest.mark.parametrize("changes", [["lora=none"], ["lora=none", "task.trainable_models=[dit,text_encoder]"]])
def test_a_run_trains_networks_in_full(changes, tmp_path):
    run_dir = train(tmp_path, *changes)
    assert all(np.isfinite(row["loss"]) for row in tiny.metrics(run_dir))
    assert len(tiny.weights(run_dir)) == len(changes)


@pytest.mark.parametrize("name", tiny.mostly_slow(["autoencoder", "pretrain"], "autoencoder"))
def test_the_experiments_of_the_embedded_model_run(name, tmp_path):
    experiment = f"experiment=emoji_flux2/{name}"
    short = ["max_steps=2", "batch_size=2", "lr_scheduler.num_warmup_steps=1", "lr_scheduler.num_decay_steps=1"]
    if name == "pretrain":
        short += [
            "validation.loss_samples=1",
            "validation.metric_samples=1",
            "validation.options.num_inference_steps=1",
        ]
    cfg = tiny.compose(
        "train", experiment, *tiny_flux2.overrides()[1:], *short, f"output_root={tmp_path}", "device=cpu"
    )
    tiny.check(cfg, tiny.schema("train"))
    files = tiny.call("train", cfg)
    assert any(str(file).endswith(".safetensors") for file in files)


# The released sizes ---------------------------------------------------------------------------------------------------


KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}
DEV = {"num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48, "joint_attention_dim": 15360}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 36, "vocab_size": 151936}
QWEN3_4B = {
    **QWEN3,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
QWEN3_8B = {**QWEN3_4B, "hidden_size": 4096, "intermediate_size": 12288}
MISTRAL3 = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "text_config": {"model_type": "mistral", "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 32},
    "vision_config": {"model_type": "pixtral"},
}
RELEASED = {  # network, text encoder, billions of parameters of the network, depths that are read
    "flux2_klein_4b": (KLEIN_4B, QWEN3_4B, 3.9, [9, 18, 27]),
    "flux2_klein_base_4b": (KLEIN_4B, QWEN3_4B, 3.9, [9, 18, 27]),
    "flux2_klein_9b": (KLEIN_9B, QWEN3_8B, 9.1, [9, 18, 27]),
    "flux2_klein_base_9b": (KLEIN_9B, QWEN3_8B, 9.1, [9, 18, 27]),
    "flux2_dev": (DEV, MISTRAL3, 32.2, [10, 20, 30]),
}


def built(config: dict, folder: Path) -> torch.nn.Module:
    """A network as its config.json says, on the meta device."""
    (folder / "config.json").write_text(json.dumps(config))
    return build_module([], folder).to(torch.bfloat16)


@pytest.mark.parametrize("name", tiny.mostly_slow(RELEASED, "flux2_klein_4b"))
def test_a_released_model_takes_a_lora_step_of_two_edited_megapixels(name, tmp_path):
    network, encoder, billions, depths = RELEASED[name]
    network = {"_class_name": "Flux2Transformer2DModel", "guidance_embeds": name == "flux2_dev", **network}
    targets = OmegaConf.to_container(tiny.compose("train", f"model={name}").model.training.lora_target_modules)
    pipe = Flux2ImagePipeline(device="meta")
    pipe.dit, pipe.text_encoder = built(network, tmp_path), built(encoder, tmp_path)
    assert sum(p.numel() for p in pipe.dit.parameters()) / 1e9 == pytest.approx(billions, abs=0.1)
    decoder = pipe.text_encoder.get_decoder()
    assert text_depths(decoder, TEXT_DEPTHS) == depths and len(
        find_layers(pipe.text_encoder, targets["text_encoder"], "")
    ) == 4 * len(decoder.layers)
    with torch.device("meta"):
        prepare_training(pipe, [], LoRA(rank=32, target_modules=targets), seed=0)
        latents, *edits = (torch.empty(2, 128, 64, width, dtype=torch.bfloat16) for width in (64, 64, 48))
        inputs = {"input_latents": latents, "edit_latents": edits}
        inputs["prompt_emb"] = torch.empty(2, 512, 3 * decoder.config.hidden_size, dtype=torch.bfloat16)
    rng = SampleRNG(0, [SampleAddress(0, 0), SampleAddress(0, 1)])
    losses = FlowMatchSFT()(pipe, rng=rng, use_gradient_checkpointing=True, **inputs)
    losses.mean().backward()
    trained = {name: p for name, p in pipe.dit.named_parameters() if p.requires_grad}
    assert losses.shape == (2,) and all(p.grad is not None for p in trained.values())
    adapted = 12 * network["num_layers"] + 2 * network["num_single_layers"]
    assert len(trained) == 2 * adapted


# Bad input ------------------------------------------------------------------------------------------------------------


def spoilt(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "model")


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path):
    folder = spoilt(tiny_flux2.klein(), tmp_path)
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=f"tokenizer in {folder}/tokenizer has no chat template, .* released"):
        tiny_flux2.pipeline(folder)


def test_a_text_encoder_of_another_width_is_refused(tmp_path):
    folder = spoilt(tiny_flux2.klein(), tmp_path)
    config = json.loads((folder / "transformer" / "config.json").read_text()) | {"joint_attention_dim": 192}
    diffusers.Flux2Transformer2DModel.from_config(config).save_pretrained(folder / "transformer")
    with pytest.raises(ValueError, match="dit takes text embeddings of width 192, but text_encoder makes 384"):
        tiny_flux2.pipeline(folder)


def test_a_network_of_another_family_is_refused():
    with pytest.raises(ValueError, match="Flux2ImagePipeline has no place for a QwenImageTransformer2DModel"):
        Flux2ImagePipeline().build_models([ModelConfig(path=str(tiny.model() / "transformer"))])


def test_two_text_encoders_are_one_too_many():
    configs = [ModelConfig(path=str(folder / "text_encoder")) for folder in (tiny_flux2.klein(), tiny_flux2.dev())]
    with pytest.raises(ValueError, match="is a Mistral3ForConditionalGeneration, as .* already is"):
        Flux2ImagePipeline().build_models(configs)
