"""Templates of FLUX.2, for generation and for editing; the guide's code; and the released size."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import templates
import tiny
import tiny_flux2
import torch
from diffusers import Flux2Transformer2DModel
from PIL import Image
from torch import Tensor

from diffsynth.cache.keys import CacheKeys
from diffsynth.cache.make import launch_data_process_task
from diffsynth.core.data import AddressedDataset, CachedDataset, Row, Sample, UnifiedDataset
from diffsynth.core.data.operators.unread import Unread
from diffsynth.core.memory import MemoryRecipe
from diffsynth.diffusion.loss import FlowMatchSFT
from diffsynth.diffusion.pipeline import kv_cache
from diffsynth.diffusion.pipeline.media import ImageMedia
from diffsynth.diffusion.template.code import read_code
from diffsynth.diffusion.template.model import Template, load_template
from diffsynth.diffusion.template.units import FEATURES
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.pipelines.flux2_image import Flux2ImagePipeline
from diffsynth.pipelines.networks.flux2 import use_joint_attention
from diffsynth.training.accelerator import make_accelerator
from diffsynth.training.checks import scan

EDITING = FlowMatchSFT(trainable_models=["template_model"], extra_inputs=["edit_image"])
GENERATING = FlowMatchSFT(trainable_models=["template_model"])


@pytest.fixture
def folder(tmp_path) -> Path:
    return templates.write(tmp_path / "template", templates.SMALL_KLEIN)


@pytest.fixture
def data(tmp_path) -> Path:
    """Rows with a picture to edit, and one that says how bright the result is."""
    folder = templates.write_rows(tmp_path / "rows", lambda n: {"image": f"{n}.png"})
    text = (folder / "metadata.jsonl").read_text()
    lines = [
        line.replace('{"image"', f'{{"edit_image": "{7 - n}.png", "image"', 1)
        for n, line in enumerate(text.splitlines())
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def dataset(folder: Path, task=EDITING) -> UnifiedDataset:
    keys = ["image", *task.extra_inputs]
    rows = UnifiedDataset.from_folder(str(folder), "metadata.jsonl", height=32, width=32, data_file_keys=keys)
    scan(rows, ImageMedia(), task, object())
    return rows


def training(folder: Path, task=EDITING, **options) -> PipelineTrainingModule:
    template = load_template(read_code(folder))
    return PipelineTrainingModule(
        tiny_flux2.pipeline(edit_image_pixels=32 * 32), task, template=template, memory=MemoryRecipe(**options)
    )


def losses(rows, module: PipelineTrainingModule) -> list[float]:
    module.load(cached=isinstance(rows, CachedDataset))
    order, samples = rows.order(4, seed=0), AddressedDataset(rows)
    batches = [[samples[order.sample(position)] for position in range(start, start + 4)] for start in (0, 4)]
    return torch.cat([module(batch) for batch in batches]).tolist()


def gradients(module: PipelineTrainingModule, samples: list[Sample]) -> dict[str, Tensor]:
    module.zero_grad()
    module(samples).mean().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("task", [GENERATING, EDITING])
def test_gradients_reach_all_of_the_template_and_nothing_else_and_a_batch_is_its_samples(task, folder, data):
    module, rows = training(folder, task).load(), dataset(data, task)
    samples = [Sample(rows[number], 0, number) for number in range(3)]
    whole, parts = gradients(module, samples), [gradients(module, [sample]) for sample in samples]
    assert whole.keys() == {f"pipe.template_model.{name}" for name, _ in module.pipe.template_model.named_parameters()}
    for name, gradient in whole.items():
        assert gradient.abs().max() > 0
        assert torch.allclose(gradient, sum(part[name] for part in parts) / 3, atol=1e-7), name
    assert torch.allclose(module(samples), torch.cat([module([sample]) for sample in samples]), rtol=1e-5)
    checkpointed = training(folder, task, checkpointing="blocks").load()
    for name, gradient in gradients(checkpointed, samples).items():
        assert torch.allclose(gradient, whole[name], atol=1e-7), name


@pytest.mark.parametrize("task", [GENERATING, EDITING])
def test_two_stages_are_the_same_training_as_one(task, folder, data, tmp_path):
    rows, module = dataset(data, task), training(folder, task)
    made = launch_data_process_task(make_accelerator("cpu", "float32"), rows, module, tmp_path / "cache").made
    assert made["TemplateProcessInputs"] == 8
    cached, stage_two = CachedDataset(str(tmp_path / "cache")), training(folder, task)
    cached.check_made_for(CacheKeys(stage_two).about)
    assert losses(cached, stage_two) == pytest.approx(losses(rows, module), rel=1e-6)
    assert stage_two.pipe.text_encoder is None


def test_a_run_of_an_editing_base_samples_its_rows(folder, data, tmp_path):
    """As the guide says: only what is edited has to be named."""
    rows = (
        "{_target_: diffsynth.core.data.UnifiedDataset.from_folder, metadata: metadata.jsonl, height: 32, width: 32, "
    )
    rows += f"data_file_keys: [image, edit_image], path: {data}}}"
    overrides = [
        *templates.overrides(folder, data),
        *tiny_flux2.overrides(),
        "task.extra_inputs=[edit_image]",
        "dataset.data_file_keys=[image,edit_image]",
        "model.edit_image_pixels=1024",
        "validation=base",
        "validation.options={height: 32, width: 32, num_inference_steps: 2}",
        f"+validation.datasets.held_out={rows}",
        "validation.row_samples=2",
        "validation.loss_samples=2",
    ]
    run_dir = tiny.train(tmp_path / "runs", *overrides)
    assert Image.open(run_dir / "samples" / "held_out_step-000002.png").width == 2 * 128


# seeds/template_model_training.md, Step 5, with {"scale": 0.8} for its {xxx}.
PRINTED = """
from diffsynth.diffusion.template import TemplatePipeline
from diffsynth.pipelines.flux2_image import Flux2ImagePipeline, ModelConfig
import torch

# Load base model
pipe = Flux2ImagePipeline.from_pretrained(
    torch_dtype=torch.bfloat16,
    device="cuda",
    model_configs=[
        ModelConfig(model_id="black-forest-labs/FLUX.2-klein-4B", origin_file_pattern="text_encoder/*.safetensors"),
        ModelConfig(model_id="black-forest-labs/FLUX.2-klein-base-4B", origin_file_pattern="transformer/*.safetensors"),
        ModelConfig(model_id="black-forest-labs/FLUX.2-klein-4B", origin_file_pattern="vae/diffusion_pytorch_model.safetensors"),
    ],
    tokenizer_config=ModelConfig(model_id="black-forest-labs/FLUX.2-klein-4B", origin_file_pattern="tokenizer/"),
)
# Load Template model
template_pipeline = TemplatePipeline.from_pretrained(
    torch_dtype=torch.bfloat16,
    device="cuda",
    model_configs=[
        ModelConfig(model_id="user_name/your_model_id")
    ],
)
# Generate an image
image = template_pipeline(
    pipe,
    prompt="a cat",
    seed=0, cfg_scale=4,
    height=1024, width=1024,
    template_inputs=[{"scale": 0.8}],
)
image.save("image.png")
"""  # noqa: E501


def test_the_sampling_code_of_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "1")
    monkeypatch.delenv("DIFFSYNTH_MODEL_BASE_PATH", raising=False)
    for name in ("FLUX.2-klein-4B", "FLUX.2-klein-base-4B"):
        shutil.copytree(tiny_flux2.klein(), tmp_path / "models" / "black-forest-labs" / name)
    templates.write(tmp_path / "user_name" / "your_model_id", templates.SMALL_KLEIN)
    changed = PRINTED.replace('"cuda"', '"cpu"').replace(
        "height=1024, width=1024", "height=32, width=32, num_inference_steps=2"
    )
    exec(changed, {})
    assert Image.open("image.png").size == (32, 32)


# The released size ----------------------------------------------------------------------------------------------------

KLEIN_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}


def test_a_template_as_its_users_write_it_trains_klein_4b_without_a_change(tmp_path):
    """From a cache, on tensors that have shapes but no values; benchmarks/template_klein_4b.py really does it."""
    pipe = Flux2ImagePipeline("meta", torch.bfloat16)
    with torch.device("meta"):
        code = read_code(templates.write(tmp_path / "template", templates.KLEIN))
        pipe.dit = Flux2Transformer2DModel(**KLEIN_4B).to(torch.bfloat16)
        template = Template(code, code.model())
    use_joint_attention(pipe.dit)
    options = {"trained_dtype": "bfloat16", "checkpointing": "blocks"}  # there is no autocast of no values
    module = PipelineTrainingModule(pipe, GENERATING, template=template, memory=MemoryRecipe(**options)).load(
        cached=True
    )
    optimizer = torch.optim.AdamW(module.trainable_parameters())
    losses = module([Sample(cached_row(), 0, number) for number in range(2)])
    losses.mean().backward()
    optimizer.step()
    parameters = dict(module.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.grad is not None}
    assert losses.shape == (2,) and trained == {
        f"pipe.template_model.{name}" for name, _ in template.model.named_parameters()
    }
    assert sum(parameters[name].numel() for name in trained) == 25 * 2 * (257 * 3072 + 3073 * 3072 + 512 * 3072)
    assert sum(p.numel() for p in pipe.dit.parameters()) == 3_875_544_576


def test_the_documented_template_is_one(tmp_path):
    text = (tiny.ROOT / "docs" / "templates.md").read_text(encoding="utf-8")
    code = read_code(templates.write(tmp_path / "template", text.split("```python\n")[1].split("```")[0]))
    template = load_template(code)
    with torch.device("meta"):
        dit = Flux2Transformer2DModel(**KLEIN_4B)
    use_joint_attention(dit)
    features = template.process_inputs(template.process_data({"scale": 0.5}), Flux2ImagePipeline("cpu", torch.float32))
    kv_cache.check(template.forward(features, None)["kv_cache"], dit, "docs")


def cached_row(size: int = 1024) -> Row:
    """What stage one leaves of a picture, a prompt and a number."""
    empty = partial(torch.empty, device="meta", dtype=torch.bfloat16)
    row = {"image": Unread((size, size), None, None), "prompt": "", "template_inputs": {}}
    posi = {"prompt_emb": empty(1, 512, 7680), FEATURES: [["value", empty(1)]]}
    return Row(row, {"shared": {"input_latents": empty(1, 128, size // 16, size // 16)}, "posi": posi, "nega": {}})
