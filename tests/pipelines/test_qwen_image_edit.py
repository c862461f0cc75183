"""Editing with Qwen-Image: what the released pipelines sample, training in batches and in two stages, released size."""

import json
from pathlib import Path

import diffusers
import pytest
import templates
import tiny
import tiny_qwen_edit
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as diffusers_edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as diffusers_edit_plus
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from test_flux2_image import edited, gradients
from test_qwen_image import REQUEST, inputs_of, latents_of, picture
from torch.testing import assert_close
from transformers import Qwen2_5_VLProcessor, Qwen2Tokenizer

from diffsynth.cache.make import launch_data_process_task
from diffsynth.core.data import CachedDataset, Sample, SampleAddress, UnifiedDataset
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.loss import FlowMatchSFT
from diffsynth.diffusion.pipeline.image_units import stretch_to_area
from diffsynth.diffusion.pipeline.media import ImageMedia
from diffsynth.diffusion.randomness import SampleRNG
from diffsynth.diffusion.template.code import read_code
from diffsynth.diffusion.template.model import load_template
from diffsynth.diffusion.training_module import PipelineTrainingModule, prepare_training
from diffsynth.pipelines.prompts.qwen_image import EDIT_PROMPT_TEMPLATE
from diffsynth.pipelines.qwen_image import ModelConfig, QwenImagePipeline, pack_latents
from diffsynth.plan.meta_pipeline import meta_pipeline
from diffsynth.training.accelerator import make_accelerator
from diffsynth.training.checks import scan

NOISE = torch.randn((1, 16, 6, 8), generator=torch.Generator().manual_seed(1))
ONE, TWO = picture(3, (80, 64)), [picture(3, (80, 64)), picture(4, (130, 60))]
NUMBERED = {"edit_image_numbered": True}
EDITING = FlowMatchSFT(extra_inputs=["edit_image"])
EVERYTHING = FlowMatchSFT(trainable_models=["dit", "text_encoder"], extra_inputs=["edit_image"])


@pytest.fixture
def pipe():
    """Qwen-Image-Edit in miniature with random weights, fresh in each test."""
    return loaded()


def loaded(folder: Path | None = None, **options) -> QwenImagePipeline:
    pipe = tiny_qwen_edit.pipeline(folder, **options)
    pipe.load_models()
    return pipe


# The released models' results -----------------------------------------------------------------------------------------


class Processor(Qwen2_5_VLProcessor):
    def check_argument_for_proper_class(self, *_):
        """The one for videos needs torchvision."""


def tell_kinds_of_tokens(text_encoder, args, inputs):
    """What the pipelines leave out and transformers 5 needs, or an image's tokens stand in a line.

    See https://github.com/huggingface/diffusers/issues/14194.
    """
    kinds = (inputs["input_ids"] == text_encoder.config.image_token_id).int()
    return args, {**inputs, "mm_token_type_ids": kinds}


def sampled_by_diffusers(monkeypatch, edit_image, cfg_scale, folder):
    """By the pipeline for one image, or that for several."""
    areas, dimensions = tiny_qwen_edit.SIZES, diffusers_edit.calculate_dimensions
    monkeypatch.setattr(
        diffusers_edit, "calculate_dimensions", lambda _, ratio: dimensions(areas["edit_image_pixels"], ratio)
    )
    monkeypatch.setattr(diffusers_edit_plus, "VAE_IMAGE_SIZE", areas["edit_image_pixels"])
    monkeypatch.setattr(diffusers_edit_plus, "CONDITION_IMAGE_SIZE", areas["edit_vision_pixels"])
    parts = diffusers.QwenImagePipeline.from_pretrained(folder, dtype=torch.float32).components
    processor = Processor(tiny_qwen_edit.image_processor(), parts["tokenizer"])
    several = isinstance(edit_image, list)
    theirs = diffusers.QwenImageEditPlusPipeline if several else diffusers.QwenImageEditPipeline
    theirs = theirs(**parts, processor=processor)
    theirs.set_progress_bar_config(disable=True)
    theirs.text_encoder.register_forward_pre_hook(tell_kinds_of_tokens, with_kwargs=True)
    request = {name: value for name, value in REQUEST.items() if name not in ("seed", "cfg_scale")}
    if cfg_scale == 1:
        del request["negative_prompt"]
    options = {"true_cfg_scale": cfg_scale, "latents": pack_latents(NOISE), "output_type": "latent"}
    return theirs(edit_image, **request, **options).images[0]


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("edit_image", [ONE, [ONE], TWO], ids=["one", "one of several", "several"])
def test_latents_are_those_of_diffusers(pipe, edit_image, cfg_scale, monkeypatch):
    numbered = NUMBERED if edit_image == [ONE] else {}
    found = latents_of(pipe, cfg_scale=cfg_scale, edit_image=edit_image, **numbered)
    expected = sampled_by_diffusers(monkeypatch, edit_image, cfg_scale, tiny_qwen_edit.folder())
    assert_close(pack_latents(found)[0], expected, atol=1e-4, rtol=0)


def test_latents_are_those_of_diffusers_where_edit_images_are_at_time_zero(monkeypatch):
    """As in Qwen-Image-Edit-2511, whose config says so."""
    folder = tiny_qwen_edit.folder(zero_cond_t=True)
    found = latents_of(loaded(folder), edit_image=TWO)
    expected = sampled_by_diffusers(monkeypatch, TWO, 3.0, folder)
    assert_close(pack_latents(found)[0], expected, atol=1e-4, rtol=0)
    assert (found - latents_of(loaded(), edit_image=TWO)).abs().max() > 1e-2


def test_prompts_and_edit_images_change_the_latents(pipe):
    """Else the comparisons with diffusers would show little."""
    base = {"edit_image": ONE, "cfg_scale": 2.0}
    changes = [
        {},
        {"prompt": "a rocket"},
        {"negative_prompt": "a rocket"},
        {"edit_image": None},
        {"edit_image": picture(5)},
        {"edit_image": TWO},
        {"edit_image": TWO[::-1]},
        {"edit_image_pixels": 96 * 96},
        NUMBERED,
    ]
    sampled = [latents_of(pipe, **{**base, **change}) for change in changes]
    assert min((a - b).abs().max() for number, a in enumerate(sampled) for b in sampled[:number]) > 1e-2


def test_the_text_encoder_sees_images_and_where_their_parts_are(pipe):
    seen = text_of(pipe, edit_image=picture(3))
    for other in (picture(3).transpose(Image.Transpose.ROTATE_180), picture(4)):
        assert (seen - text_of(pipe, edit_image=other)).abs().max() > 1e-3
    pipe.text_encoder.model.register_forward_pre_hook(
        lambda _, args, given: (args, {**given, "mm_token_type_ids": None}), with_kwargs=True
    )
    assert (seen - text_of(pipe, edit_image=picture(3))).abs().max() > 1e-3


def text_of(pipe, **changes):
    return inputs_of(pipe, **changes)[1]["prompt_emb"]


def test_one_image_is_seen_as_it_is_encoded_and_several_smaller(pipe):
    """Tokens of a template after its 64, of images at 28 x 28 pixels each, and of their numbers."""
    prompt = len(pipe.tokenizer(EDIT_PROMPT_TEMPLATE.format(REQUEST["prompt"])).input_ids) - 64
    numbers = len(pipe.tokenizer("Picture 1: Picture 2: ").input_ids)
    one = {"edit_image": picture(3, (64, 64)), "edit_image_pixels": 96 * 96}
    assert text_of(pipe, **one).shape == (1, prompt + 2 + 3 * 3, 128)
    assert text_of(pipe, **one, edit_vision_pixels=32 * 32).shape == (1, prompt + 2 + 3 * 3, 128)
    two = {"edit_image": [picture(3, (64, 64))] * 2, "edit_vision_pixels": 64 * 64}
    assert text_of(pipe, **two).shape == (1, prompt + 2 * (2 + 2 * 2) + numbers, 128)


@pytest.mark.parametrize("size", [(80, 64), (130, 60), (60, 700), (1024, 1024)])
def test_images_are_resized_as_in_diffusers(size):
    image = picture(0, size)
    width, height = diffusers_edit_plus.calculate_dimensions(256 * 256, size[0] / size[1])
    expected = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=16).resize(image, height, width)
    found = stretch_to_area(image, 256 * 256)
    assert found.size == expected.size and found.tobytes() == expected.tobytes()


MEDIA = {
    "kv_cache": {"block_1": tuple(torch.randn(2, 1, 3, 4, 32, generator=torch.Generator().manual_seed(0)))},
    "extra_text_embedding": torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(0)),
    "lora": {
        f"transformer_blocks.0.attn.to_q.lora_{side}.weight": torch.ones(shape) / 20
        for side, shape in {"A": (2, 128), "B": (128, 2)}.items()
    },
}


@pytest.mark.parametrize("name", MEDIA)
def test_what_templates_give_reaches_edited_images(name, pipe):
    medium = {name: MEDIA[name]}
    changes = [{"prompt": "red " * n, "seed": n, "edit_image": picture(n)} for n in range(2)]
    pipe.decode = lambda latents, request: latents
    found = torch.cat(pipe.generate([{**REQUEST, **change, **medium} for change in changes]))
    alone = torch.cat([latents_of(pipe, **change, **medium) for change in changes])
    assert_close(found, alone, atol=1e-5, rtol=0)
    assert (found - torch.cat([latents_of(pipe, **change) for change in changes])).abs().max() > 1e-3


# Training -------------------------------------------------------------------------------------------------------------


def training(task=EDITING, template=None) -> PipelineTrainingModule:
    """A training whose models are built, not loaded."""
    template = template and load_template(read_code(template))
    return PipelineTrainingModule(tiny_qwen_edit.pipeline(), task, template=template)


def test_gradients_reach_the_vision_tower_too():
    module = training(EVERYTHING).load()
    _, reached = gradients(module, [edited()])
    assert any(".visual." in name for name in reached)
    assert all(gradient.abs().max() > 0 for name, gradient in reached.items() if ".visual.patch_embed." in name)


# In two stages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path) -> Path:
    """Rows with two images to edit, and the inputs of a template."""
    folder = templates.write_rows(tmp_path / "rows")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [{**row, "edit_image": [f"{7 - n}.png", "0.png"]} for n, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def dataset(folder: Path, task=EDITING) -> UnifiedDataset:
    keys = ["image", *task.extra_inputs]
    rows = UnifiedDataset.from_folder(str(folder), "metadata.jsonl", height=32, width=32, data_file_keys=keys)
    scan(rows, ImageMedia(), task, object())
    return rows


def make_cache(folder: Path, rows, module) -> dict[str, int]:
    return launch_data_process_task(make_accelerator("cpu", "float32"), rows, module, folder).made


def losses(rows, module) -> torch.Tensor:
    module.load(cached=isinstance(rows, CachedDataset))
    return torch.cat([module([Sample(rows[n], 0, n) for n in batch]) for batch in ((0, 1, 2, 3), (4, 5, 6, 7))])


TEMPLATE = FlowMatchSFT(trainable_models=["template_model"], extra_inputs=["edit_image"])


def test_a_template_of_an_editing_base_has_in_two_stages_the_losses_of_one(data, tmp_path):
    template = templates.write(tmp_path / "template", templates.SCALE)
    make_cache(tmp_path / "cache", dataset(data, TEMPLATE), training(TEMPLATE, template=template))
    cached = losses(CachedDataset(str(tmp_path / "cache")), training(TEMPLATE, template=template))
    assert_close(cached, losses(dataset(data, TEMPLATE), training(TEMPLATE, template=template)), atol=1e-6, rtol=1e-6)


def test_another_edit_image_makes_what_depends_on_it_anew(data, tmp_path):
    make_cache(tmp_path / "cache", dataset(data), training())
    assert make_cache(tmp_path / "cache", dataset(data), training()) == {}
    Image.new("RGB", (32, 32), "red").save(data / "2.png")  # the image of row 2, and an image to edit of row 5
    made = make_cache(tmp_path / "cache", dataset(data), training())
    names = ("InputImageEmbedder", "QwenImageUnit_EditImageEmbedder", "QwenImageUnit_PromptEmbedder")
    assert made == dict.fromkeys(names, 1)


def test_gradients_reach_all_of_a_template_of_an_editing_base(data, tmp_path):
    folder, rows = templates.write(tmp_path / "template", templates.SCALE), dataset(data)
    module = training(TEMPLATE, template=folder).load()
    _, found = gradients(module, [[Sample(rows[n], 0, n) for n in range(3)]])
    assert found.keys() == {f"pipe.template_model.{n}" for n, _ in module.pipe.template_model.named_parameters()}
    assert all(gradient.abs().max() > 0 for gradient in found.values())


# Runs -----------------------------------------------------------------------------------------------------------------


ROWS = [
    "dataset.metadata=metadata.jsonl",
    "task.extra_inputs=[edit_image]",
    "dataset.data_file_keys=[image,edit_image]",
]


def test_a_run_trains_an_adapter_that_changes_what_is_sampled(pipe, data, tmp_path):
    run_dir = tiny.train(tmp_path, *tiny_qwen_edit.overrides(), f"dataset.path={data}", *ROWS, "optimizer.lr=0.05")
    (file,) = (run_dir / "weights").glob("*.safetensors")
    assert "diffusion_model.transformer_blocks.0.attn.to_q.lora_down.weight" in load_file(file)
    base = latents_of(pipe, edit_image=TWO)
    pipe.load_lora("dit", file)
    assert (latents_of(pipe, edit_image=TWO) - base).abs().max() > 0.02


def test_a_run_trains_a_template_and_samples_its_rows(data, tmp_path):
    template = templates.write(tmp_path / "template", templates.SCALE)
    keys = (
        "{_target_: diffsynth.core.data.UnifiedDataset.from_folder, metadata: metadata.jsonl, height: 32, width: 32, "
    )
    run_dir = tiny.train(
        tmp_path / "runs",
        *tiny_qwen_edit.overrides(),
        *templates.overrides(template, data),
        *ROWS,
        "validation=base",
        "validation.options={height: 32, width: 32, num_inference_steps: 2}",
        f"+validation.datasets.held_out={keys} data_file_keys: [image, edit_image], path: {data}}}",
        "validation.row_samples=2",
        "validation.loss_samples=2",
    )
    assert Image.open(run_dir / "samples" / "held_out_step-000002.png").width == 2 * 128


# The released size ----------------------------------------------------------------------------------------------------

RELEASED = ["qwen_image_edit", "qwen_image_edit_2509", "qwen_image_edit_2511"]
SAMPLED = {  # models of the same architecture, and their steps and scale of guidance
    "qwen_image_2512": (30, 4.0),
    "qwen_image_distill_full": (15, 1.0),
    "firered_image_edit_10": (30, 4.0),
    "firered_image_edit_11": (30, 4.0),
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_configuration_is_complete(name):
    cfg = tiny.compose("train", f"model={name}", "dataset=image_folder", "dataset.path=.", *ROWS[1:])
    tiny.check(cfg, tiny.schema("train"))
    folders = {cfg.model[part].model_id for part in tiny_qwen_edit.PARTS}
    assert {folder.lower().replace("-", "_") for folder in folders} == {f"qwen/{name}"}
    assert cfg.model.edit_image_numbered == (name != "qwen_image_edit")


@pytest.mark.parametrize("name", tiny.mostly_slow(SAMPLED, "qwen_image_distill_full"))
def test_models_of_the_same_architecture_have_a_configuration_and_a_known_architecture(name):
    cfg = tiny.compose("plan", f"model={name}")
    pipe = meta_pipeline(tiny.build(cfg)["model"], tokens=8)
    request = pipe.complete({"prompt": ""})
    assert (request["num_inference_steps"], request["cfg_scale"]) == SAMPLED[name]
    assert sum(p.numel() for p in pipe.dit.parameters()) == pytest.approx(20.43e9, abs=5e6)
    assert cfg.model.get("edit_image_numbered", False) == name.startswith("firered")


@pytest.mark.slow
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_all_blocks_take_a_lora_step_of_two_edited_megapixels(zero_cond_t):
    pipe = QwenImagePipeline(device="meta", torch_dtype=torch.bfloat16)
    targets = OmegaConf.to_container(tiny.compose("train", f"model={RELEASED[0]}").model.training.lora_target_modules)
    with torch.device("meta"):
        pipe.dit = diffusers.QwenImageTransformer2DModel(zero_cond_t=zero_cond_t).to(torch.bfloat16)
        prepare_training(pipe, [], LoRA(rank=32, models=["dit"], target_modules=targets["dit"]), seed=0)
        latents, *edits = (torch.empty(2, 16, 128, width, dtype=torch.bfloat16) for width in (128, 128, 96))
        inputs = {"input_latents": latents, "edit_latents": edits}
        inputs["prompt_emb"] = torch.empty(2, 700, 3584, dtype=torch.bfloat16)
        inputs["prompt_emb_mask"] = torch.empty(2, 700, dtype=torch.bool)
    rng = SampleRNG(0, [SampleAddress(0, 0), SampleAddress(0, 1)])
    losses = FlowMatchSFT()(pipe, rng=rng, use_gradient_checkpointing=True, **inputs)
    losses.mean().backward()
    trained = {name: p for name, p in pipe.dit.named_parameters() if p.requires_grad}
    without = {name.split(".lora_")[0] for name, p in trained.items() if p.grad is None}
    assert losses.shape == (2,) and len(trained) == 2 * 12 * 60
    last = "transformer_blocks.59."  # whose text goes nowhere
    assert without == {f"{last}attn.to_add_out", f"{last}txt_mlp.net.2"}


# Bad input ------------------------------------------------------------------------------------------------------------


def test_editing_without_a_processor_names_the_remedy():
    pipe = loaded(processor=None)
    assert latents_of(pipe).shape == (1, 16, 6, 8)
    with pytest.raises(ValueError, match="edit_image is given, but model.processor is null.* model=qwen_image_edit"):
        pipe(**REQUEST, edit_image=ONE)


def test_a_tokenizer_that_cuts_the_template_elsewhere_is_refused():
    pipe = QwenImagePipeline()
    pipe.build_folder("tokenizer", ModelConfig(path=tiny.model() / "tokenizer"))
    assert isinstance(pipe.tokenizer, Qwen2Tokenizer)
    with pytest.raises(ValueError, match=r"makes \d+ tokens of the template of edit prompts, expected 64"):
        pipe.build_folder("processor", ModelConfig(path=tiny_qwen_edit.folder() / "processor"))
