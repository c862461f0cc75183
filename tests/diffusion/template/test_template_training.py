"""Training a template: alone, in one stage and in two, and what is refused before it costs anything."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import templates
import tiny
import torch
import warm
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffsynth.cache.keys import CacheKeys
from diffsynth.cache.make import launch_data_process_task
from diffsynth.cache.verify import verify
from diffsynth.core.data import AddressedDataset, CachedDataset, Sample, UnifiedDataset
from diffsynth.core.loader import ModelConfig
from diffsynth.core.memory import MemoryRecipe
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.loss import FlowMatchSFT
from diffsynth.diffusion.pipeline.media import ImageMedia
from diffsynth.diffusion.template import load_template_model
from diffsynth.diffusion.template.code import read_code
from diffsynth.diffusion.template.model import load_template
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.pipelines.qwen_image import QwenImagePipeline
from diffsynth.training.accelerator import make_accelerator
from diffsynth.training.checks import scan

IMAGES, PROMPTS, INPUTS = "InputImageEmbedder", "QwenImageUnit_PromptEmbedder", "TemplateProcessInputs"
CLOSE = {"rel": 1e-6, "abs": 1e-6}

# What process_inputs makes of the picture with the pipeline's own autoencoder becomes a LoRA.
IMAGE_TO_LORA = """
import numpy as np
import torch
from PIL import Image


class ImageToLoRA(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.down = torch.nn.Linear(16, 2 * 128)
        self.up = torch.nn.Linear(16, 128 * 2)

    @torch.no_grad()
    def process_inputs(self, pipe, image, **kwargs):
        image = Image.open(image) if isinstance(image, str) else image
        pixels = pipe.preprocess_image(image.convert("RGB").resize((32, 32)))
        return {"latents": pipe.vae.encode(pixels).mean((2, 3))}

    def forward(self, latents, **kwargs):
        layers = ["transformer_blocks.0.attn.to_q", "transformer_blocks.2.img_mod.1"]
        down, up = self.down(latents).view(2, 128), self.up(latents).view(128, 2)
        sizes = [128, 768]
        return {"lora": {
            f"transformer.{name}.lora_{side}.weight": matrix
            for name, size in zip(layers, sizes)
            for side, matrix in {"A": down, "B": up.repeat(size // 128, 1)}.items()
        }}


TEMPLATE_MODEL = ImageToLoRA
"""

# As many tokens of text as the number says.
TEXT = """
import torch


class Text(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = torch.nn.Parameter(torch.randn(1, 4, 128))

    def process_inputs(self, scale, **kwargs):
        return {"scale": scale, "count": 2}

    def forward(self, scale, count, **kwargs):
        return {"extra_text_embedding": (1 + scale) * self.tokens[:, :count]}


TEMPLATE_MODEL = Text
"""

# Adds to the image's tokens after two blocks, by a number.
RESIDUALS = """
import torch


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(128, 128)

    def forward(self, image, condition):
        return self.mix(image + condition).tanh()


class Residuals(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(1, 128)
        self.layers = torch.nn.ModuleDict({"block_0": Layer(), "block_2": Layer()})

    def process_inputs(self, scale, height, width, **kwargs):
        return {"scale": scale, "tokens": height // 16 * (width // 16)}

    def forward(self, scale, tokens, **kwargs):
        condition = self.embed(torch.full((1, tokens, 1), float(scale)))
        return {"block_residuals": {"layers": dict(self.layers), "condition": condition, "scale": 0.5}}


TEMPLATE_MODEL = Residuals
"""
TEMPLATES = {"kv_cache": templates.SCALE, "part": templates.FROZEN_PART, "lora": IMAGE_TO_LORA, "text": TEXT}
TEMPLATES["residuals"] = RESIDUALS


@pytest.fixture(params=tiny.mostly_slow(TEMPLATES, "kv_cache", "lora"))
def kind(request) -> str:
    return request.param


@pytest.fixture
def data(tmp_path) -> Path:
    """Rows of a number and of a picture each."""
    return templates.write_rows(
        tmp_path / "data", lambda n: {"scale": n / 10} if n % 2 else {"scale": n / 10, "image": f"{n}.png"}
    )


@pytest.fixture
def rows_of(tmp_path):
    """A data set whose rows are what a kind of template wants."""

    def make(kind: str, folder: str = "rows") -> UnifiedDataset:
        inputs = (lambda n: {"image": f"{n}.png"}) if kind == "lora" else None
        path = tmp_path / folder
        return dataset(path if path.exists() else templates.write_rows(path, inputs))

    return make


def dataset(folder: Path, metadata: str = "metadata.jsonl") -> UnifiedDataset:
    rows = UnifiedDataset.from_folder(str(folder), metadata, height=32, width=32)
    scan(rows, ImageMedia(), FlowMatchSFT(), object())
    return rows


def training(folder: Path, *trained: str, lora=None, task=None, **options) -> PipelineTrainingModule:
    """A training of a template, whose models are built, not loaded."""
    configs = {name: ModelConfig(path=str(tiny.model() / part)) for name, part in tiny.COMPONENTS.items()}
    pipe = QwenImagePipeline.from_components(**configs, torch_dtype="float32")
    task = task or FlowMatchSFT(trainable_models=trained or ["template_model"])
    template = load_template(read_code(folder))
    return PipelineTrainingModule(pipe, task, lora, template=template, memory=MemoryRecipe(**options))


def without_template() -> PipelineTrainingModule:
    configs = {name: ModelConfig(path=str(tiny.model() / part)) for name, part in tiny.COMPONENTS.items()}
    return PipelineTrainingModule(QwenImagePipeline.from_components(**configs, torch_dtype="float32"), FlowMatchSFT())


def trained_parts(kind: str) -> list[str]:
    return ["template_model.mlp"] if kind == "part" else ["template_model"]


@pytest.fixture
def of_kind(tmp_path):
    """A training of a kind of template."""

    def make(kind: str, *changes: tuple[str, str], folder: str = "template", **options) -> PipelineTrainingModule:
        written = templates.write(tmp_path / folder, TEMPLATES[kind], *changes)
        return training(written, *trained_parts(kind), **options)

    return make


def make(folder: Path, rows, module) -> dict[str, int]:
    """What stage one had to make."""
    return launch_data_process_task(make_accelerator("cpu", "float32"), rows, module, folder).made


def losses(rows, module: PipelineTrainingModule) -> list[float]:
    module.load(cached=isinstance(rows, CachedDataset))
    order, samples = rows.order(4, seed=0), AddressedDataset(rows)
    batches = [[samples[order.sample(position)] for position in range(start, start + 4)] for start in (0, 4)]
    return torch.cat([module(batch) for batch in batches]).tolist()


def samples_of(rows) -> list[Sample]:
    return [Sample(rows[number], epoch=0, index=number) for number in range(3)]


def gradients(module: PipelineTrainingModule, samples: list[Sample]) -> dict[str, Tensor]:
    module.zero_grad()
    module(samples).mean().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# What is trained ------------------------------------------------------------------------------------------------------


def test_gradients_reach_what_is_trained_and_nothing_else(kind, of_kind, rows_of):
    module = of_kind(kind).load()
    found = gradients(module, samples_of(rows_of(kind)))
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert found.keys() == trained and all(gradient.abs().max() > 0 for gradient in found.values())
    assert {name for name in trained if not name.startswith(f"pipe.{trained_parts(kind)[0]}.")} == set()


def test_a_batch_is_its_samples(kind, of_kind, rows_of):
    module, samples = of_kind(kind).load(), samples_of(rows_of(kind))
    together, singles = module(samples), torch.cat([module([sample]) for sample in samples])
    assert torch.allclose(together, singles, rtol=1e-5)
    whole, parts = gradients(module, samples), [gradients(module, [sample]) for sample in samples]
    for name, gradient in whole.items():
        assert torch.allclose(gradient, sum(part[name] for part in parts) / 3, atol=1e-7), name


@pytest.mark.parametrize("offload", [False, True])
def test_checkpointing_changes_nothing(offload, kind, of_kind, rows_of):
    samples = samples_of(rows_of(kind))
    saving = {"checkpointing": "blocks", "offload_activations": offload}
    plain, recomputed = (gradients(of_kind(kind, **options).load(), samples) for options in ({}, saving))
    for name, gradient in plain.items():
        assert torch.allclose(gradient, recomputed[name], atol=1e-7), name


def test_what_a_template_makes_counts(kind, of_kind, rows_of):
    module, samples = of_kind(kind).load(), samples_of(rows_of(kind))
    assert not torch.allclose(module(samples), without_template().load()(samples), rtol=1e-4)


def test_a_template_is_told_of_checkpointing_and_the_pipeline(of_kind, rows_of):
    module = of_kind("text", checkpointing="blocks").load()
    seen = []
    module.pipe.template_model.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    module(samples_of(rows_of("text"))[:1])
    assert seen[0].keys() == {
        "scale", "count", "pipe", "use_gradient_checkpointing", "use_gradient_checkpointing_offload",
    } and seen[0]["pipe"] is module.pipe and seen[0]["use_gradient_checkpointing"] is True  # fmt: skip


def test_a_lora_of_the_base_may_be_trained_along(of_kind, rows_of):
    module = of_kind("kv_cache", lora=LoRA(rank=2, target_modules=["to_q"])).load()
    names = {name.split(".")[1] for name in gradients(module, samples_of(rows_of("kv_cache")))}
    assert names == {"dit", "template_model"} and module.export_weights().keys() == {"template_model", "lora"}


def test_frozen_parts_are_in_the_bases_dtype_and_trained_ones_in_fp32(tmp_path):
    folder = templates.write(tmp_path / "template", templates.FROZEN_PART)
    configs = {name: ModelConfig(path=str(tiny.model() / part)) for name, part in tiny.COMPONENTS.items()}
    pipe = QwenImagePipeline.from_components(**configs, torch_dtype="bfloat16")
    task, template = (
        FlowMatchSFT(trainable_models=["template_model.mlp"]),
        load_template(read_code(folder)),
    )
    exact = template.model.mlp.weight.clone()
    model = PipelineTrainingModule(pipe, task, None, template=template).load().pipe.template_model
    assert model.encoder.weight.dtype == torch.bfloat16 and torch.equal(model.mlp.weight, exact)


# In two stages --------------------------------------------------------------------------------------------------------


def test_two_stages_are_the_same_training_as_one(kind, of_kind, rows_of, tmp_path):
    rows, module = rows_of(kind), of_kind(kind)
    assert make(tmp_path / "cache", rows, module) == {IMAGES: 8, PROMPTS: 8, INPUTS: 8}
    cached, stage_two = CachedDataset(str(tmp_path / "cache")), of_kind(kind)
    cached.check_made_for(CacheKeys(stage_two).about)
    assert losses(cached, stage_two) == pytest.approx(losses(rows, module), **CLOSE)
    assert stage_two.pipe.vae is None and stage_two.pipe.text_encoder is None


def test_only_the_networks_that_its_code_leads_to_are_loaded_for_it(of_kind):
    used = {
        kind: next(u for u in of_kind(kind, folder=kind).units if type(u).__name__ == INPUTS).onload_model_names
        for kind in TEMPLATES
    }
    assert used == {"kv_cache": (), "part": (), "lora": ("vae",), "text": (), "residuals": ()}


@pytest.mark.parametrize(
    "code, used",
    [
        ("pipe.text_encoder", ("text_encoder",)),
        ("pipe.tokenize('a')", ()),
        ("pipe('a')", ("dit", "text_encoder", "vae")),
        ("pipe.get_submodule('dit')", ("dit", "text_encoder", "vae")),
        ("[*pipe.parameters()]", ("dit", "text_encoder", "vae")),
        (
            "QwenImageUnit_PromptEmbedder().process(pipe, 'a')",
            ("dit", "text_encoder", "vae"),
        ),  # too much: of the whole pipeline
    ],
)
def test_networks_are_found_behind_the_pipelines_own_code(code, used, of_kind):
    imported = ("import torch", "import torch\nfrom diffsynth.pipelines.qwen_image import QwenImageUnit_PromptEmbedder")
    body = (
        "def process_inputs(self, scale, **kwargs):",
        f"def process_inputs(self, scale, pipe, **kwargs):\n        {code}",
    )
    units = of_kind("text", imported, body).units
    assert next(unit for unit in units if type(unit).__name__ == INPUTS).onload_model_names == used


def test_a_pipeline_that_is_taken_from_the_keyword_arguments_is_seen(of_kind):
    body = (
        "def process_inputs(self, scale, **kwargs):",
        'def process_inputs(self, scale, **kwargs):\n        kwargs["pipe"].text_encoder',
    )
    units = of_kind("text", body).units
    assert next(unit for unit in units if type(unit).__name__ == INPUTS).onload_model_names == ("text_encoder",)


def entries_made_after(change, of_kind, kind: str, rows_of, tmp_path) -> dict[str, int]:
    """What stage one makes again after a change; what it made is verified before and after."""
    cache, module = tmp_path / "cache", of_kind(kind)
    make(cache, rows_of(kind), module)
    assert (
        make(cache, rows_of(kind), of_kind(kind)) == {} == {d: 1 for d in verify(rows_of(kind), of_kind(kind), cache)}
    )
    module = change() or of_kind(kind)
    assert bool(verify(rows_of(kind), module, cache)) == bool(made := make(cache, rows_of(kind), module))
    assert verify(rows_of(kind), module, cache) == []
    return made


def test_any_change_of_the_code_makes_its_part_anew(of_kind, rows_of, tmp_path):
    change = lambda: of_kind("part", ("import torch", "import torch  # a remark"))  # noqa: E731
    assert entries_made_after(change, of_kind, "part", rows_of, tmp_path) == {INPUTS: 8}
    with pytest.raises(ValueError, match=f"{INPUTS}: the cache was made with template"):
        CachedDataset(str(tmp_path / "cache")).check_made_for(CacheKeys(of_kind("part")).about)


MADE = [("encoder.bias", {INPUTS: 8}), ("mlp.bias", {})]


@pytest.mark.parametrize("key_and_made", tiny.mostly_slow(MADE, MADE[0]), ids=str)
def test_other_weights_make_its_part_anew_if_they_are_frozen(key_and_made, of_kind, rows_of, tmp_path):
    """The file changes, the code that names it does not."""
    key, made = key_and_made
    change = ("TEMPLATE_MODEL = Template", "TEMPLATE_MODEL = Template\nTEMPLATE_MODEL_PATH = 'model.safetensors'")
    named = lambda kind: of_kind(kind, change)  # noqa: E731
    weights = load_template_model(
        templates.write(tmp_path / "plain", templates.FROZEN_PART), torch.float32
    ).state_dict()
    (tmp_path / "template").mkdir()
    save_file(weights, tmp_path / "template" / "model.safetensors")

    def other():
        save_file({**weights, key: weights[key] + 1}, tmp_path / "template" / "model.safetensors")

    assert entries_made_after(other, named, "part", rows_of, tmp_path) == made


def test_another_value_makes_its_entry_anew(of_kind, rows_of, tmp_path):
    file = tmp_path / "rows" / "metadata.jsonl"
    change = lambda: file.write_text(file.read_text().replace('"scale": 0.25', '"scale": 0.26')) and None  # noqa: E731
    assert entries_made_after(change, of_kind, "kv_cache", rows_of, tmp_path) == {INPUTS: 1}


@pytest.mark.slow  # cache/test_cache.py changes pictures, too
def test_another_picture_of_that_name_makes_its_entry_anew(of_kind, rows_of, tmp_path):
    def change():
        Image.new("RGB", (32, 32), "red").save(tmp_path / "rows" / "3.png")

    made = entries_made_after(change, of_kind, "lora", rows_of, tmp_path)
    assert made == {INPUTS: 1, IMAGES: 1}  # it is trained on, too


def test_a_data_set_that_was_moved_makes_nothing_anew(of_kind, rows_of, tmp_path):
    make(tmp_path / "cache", rows_of("lora"), of_kind("lora"))
    shutil.move(tmp_path / "rows", tmp_path / "moved")
    assert make(tmp_path / "cache", rows_of("lora", "moved"), of_kind("lora")) == {}
    assert verify(rows_of("lora", "moved"), of_kind("lora"), tmp_path / "cache") == []


def test_files_are_named_from_the_data_set_or_by_their_absolute_path(of_kind, rows_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a picture of that name is another one
    Image.new("RGB", (32, 32), "red").save("1.png")
    relative = rows_of("lora")
    absolute = dataset(
        templates.write_rows(tmp_path / "other", lambda n: {"image": str(tmp_path / "rows" / f"{n}.png")})
    )
    module = of_kind("lora").load()
    assert torch.equal(module(samples_of(relative)), module(samples_of(absolute)))


def test_a_cache_without_the_template_is_refused(of_kind, rows_of, tmp_path):
    make(tmp_path / "cache", rows_of("kv_cache"), without_template())
    with pytest.raises(ValueError, match=f"{INPUTS}: the cache holds none of its outputs"):
        CachedDataset(str(tmp_path / "cache")).check_made_for(CacheKeys(of_kind("kv_cache")).about)


def test_what_process_inputs_makes_comes_back_from_a_cache_as_it_was(of_kind, rows_of, tmp_path):
    made = '{"scale": torch.tensor(scale), "count": [1, 2.5, None, "a", True, [torch.zeros(2, dtype=torch.bfloat16)]]}'
    change = ('{"scale": scale, "count": 2}', made)
    seen = [('return {"extra', 'self.seen = scale, count\n        return {"extra'), ("[:, :count]", "")]
    rows, seen_by = rows_of("text"), []
    make(tmp_path / "cache", rows, of_kind("text", change, *seen))
    for given in (rows, CachedDataset(str(tmp_path / "cache"))):
        module = of_kind("text", change, *seen)
        losses(given, module)
        seen_by.append(module.pipe.template_model.seen)
    assert repr(seen_by[0]) == repr(seen_by[1]) and len(seen_by[0][1]) == 6


@pytest.mark.parametrize(
    "made, message",
    [
        ('{"x": object()}', "x, which process_inputs returns, is a object; expected a tensor, a number"),
        ('{"x": [1, {"a": 2}]}', r"x\[1\], which process_inputs returns, is a dict"),
        ('{"x": __import__("numpy").float32(1)}', "is a float32.*torch.as_tensor makes a tensor"),
        ("[1]", "process_inputs returns a list, expected a dict"),
    ],
)
def test_what_no_cache_holds_is_refused_in_one_stage_too(made, message, of_kind, rows_of):
    module = of_kind("text", ('{"scale": scale, "count": 2}', made)).load()
    with pytest.raises(ValueError, match=f"sample 0 .*model.py.*{message}"):
        module(samples_of(rows_of("text")))


@pytest.mark.parametrize(
    "reads, named",
    [
        ("self.mlp(torch.zeros(1, 6))", "template_model.mlp.weight"),
        ("2 * self.mlp.bias", "template_model.mlp.bias"),
        ("torch.nn.functional.linear(torch.zeros(1, 6), self.mlp.weight)", "template_model.mlp.weight"),
        ("self.mlp.weight.sum().item()", "template_model.mlp.weight"),
        ("self.mlp.weight.tolist()", "template_model.mlp.weight"),
        ("self.mlp.bias.data + 1", "template_model.mlp.bias"),
        (
            "[self.mlp.weight.dtype, self.mlp.weight.device, self.mlp.weight.shape, next(self.parameters()).device]",
            None,
        ),
    ],
)
def test_process_inputs_may_not_read_what_is_trained(reads, named, of_kind, rows_of):
    head = "def process_inputs(self, scale, **kwargs):"
    module = of_kind("part", (head, f"{head}\n        {reads}")).load()
    if named is None:
        assert module(samples_of(rows_of("part"))).isfinite().all()
        return
    with pytest.raises(ValueError, match=f"process_inputs reads {named}, which is being trained.*Move that to forward"):
        module(samples_of(rows_of("part")))


def test_process_inputs_may_not_read_a_text_encoder_that_is_trained_but_is_then_not_cached(of_kind, rows_of):
    task = FlowMatchSFT(trainable_models=["template_model", "text_encoder"])
    head = (
        "def process_inputs(self, scale, **kwargs):",
        "def process_inputs(self, scale, pipe, **kwargs):\n        pipe.text_encoder",
    )
    module = of_kind("text", head, task=task)
    assert INPUTS in [type(unit).__name__ for unit in module.live_units]


# What is saved --------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_was_trained_and_loads_as_the_templates_weights(kind, of_kind, rows_of, tmp_path):
    module, samples = of_kind(kind).load(), samples_of(rows_of(kind))
    with torch.no_grad():
        for parameter in module.trainable_parameters():
            parameter += 0.05
    ((name, (tensors, _)),) = module.export_weights().items()
    own = dict(module.pipe.template_model.named_parameters())
    assert name == "template_model" and tensors.keys() == {key for key, p in own.items() if p.requires_grad}
    save_file(tensors, tmp_path / "template" / "trained.safetensors")
    changes = ("TEMPLATE_MODEL = ", "TEMPLATE_MODEL_PATH = 'trained.safetensors'\nTEMPLATE_MODEL = ")
    text = TEMPLATES[kind].replace("TEMPLATE_MODEL_PATH = None\n", "")
    (tmp_path / "template" / "model.py").write_text(text.replace(*changes))
    again = training(tmp_path / "template", *trained_parts(kind)).load()
    assert torch.equal(again(samples), module(samples))
    assert again.pipe.sources()["template_model"]["path"] == str(tmp_path / "template")


def test_continuing_goes_on_from_the_file(tmp_path):
    """A run, its weights named in model.py, and a run that learns nothing: what it saves is what it was given."""
    folder, rows = templates.write(tmp_path / "template", templates.SCALE), templates.write_rows(tmp_path / "rows")
    overrides = templates.overrides(folder, rows)
    first = tiny.train(tmp_path / "first", *overrides, "optimizer.eps=1e-8", "optimizer.lr=0.01")
    random = load_template(read_code(folder)).model.state_dict()
    trained = load_file(first / "weights" / "epoch-0.safetensors")
    assert trained.keys() == random.keys() and not any(torch.equal(trained[key], random[key]) for key in random)
    shutil.copy(first / "weights" / "epoch-0.safetensors", folder / "model.safetensors")
    templates.write(
        folder, templates.SCALE, ("TEMPLATE_MODEL_PATH = None", "TEMPLATE_MODEL_PATH = 'model.safetensors'")
    )
    second = tiny.train(tmp_path / "second", *overrides, "optimizer.lr=0.0")
    kept = load_file(second / "weights" / "epoch-0.safetensors")
    assert all(torch.equal(kept[key], trained[key]) for key in trained)


# Rows -----------------------------------------------------------------------------------------------------------------


def test_a_csv_holds_template_inputs_as_json(of_kind, rows_of, tmp_path):
    rows = rows_of("kv_cache")
    with (tmp_path / "rows" / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["image", "prompt", "template_inputs"])
        writer.writeheader()
        writer.writerows({**row, "template_inputs": json.dumps(row["template_inputs"])} for row in rows.rows)
    module = of_kind("kv_cache").load()
    in_csv = dataset(tmp_path / "rows", "metadata.csv")
    assert torch.equal(module(samples_of(in_csv)), module(samples_of(rows)))


@pytest.mark.parametrize(
    "row, message",
    [
        ({}, "row 3: has no template_inputs, but image, prompt"),
        ({"template_inputs": None}, "row 3: template_inputs None: found None, expected template inputs such as"),
        ({"template_inputs": 0.2}, "row 3: template_inputs 0.2: found 0.2, expected"),
        ({"template_inputs": "{scale: 0.2}"}, "found '{scale: 0.2}', expected.* which a csv holds as JSON text"),
        ({"template_inputs": "[1]"}, r"found '\[1\]', expected"),
    ],
)
def test_rows_without_inputs_are_named_before_anything_is_loaded(row, message, tmp_path, no_weights_are_read):
    rows = templates.write_rows(tmp_path / "rows")
    lines = (rows / "metadata.jsonl").read_text().splitlines()
    lines[2] = json.dumps({"image": "2.png", "prompt": "a", **row})
    (rows / "metadata.jsonl").write_text("\n".join(lines))
    folder = templates.write(tmp_path / "template", templates.SCALE)
    for run in (tiny.train, tiny.make_cache):
        with pytest.raises(ValueError, match=f"1 of 8 rows of {rows}/metadata.jsonl cannot be used:\n  .*{message}"):
            run(tmp_path / "out", *templates.overrides(folder, rows))


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"scole": 0.2}, "model.py: process_inputs needs 'scale'; it was given .'scole'."),
        ({"image": "gone.png"}, r"model.py, line \d+: TEMPLATE_DATA_PROCESSOR of {'image': 'gone.png'}: FileNotFound"),
    ],
)
def test_a_row_that_the_template_cannot_read_is_named(inputs, message, of_kind, rows_of, tmp_path):
    rows = dataset(templates.write_rows(tmp_path / "rows", lambda n: inputs))
    change = [] if "image" in inputs else [("TEMPLATE_DATA_PROCESSOR = Processor", "")]
    module = of_kind("kv_cache", *change).load()
    with pytest.raises(ValueError, match=f"(?s)sample 0 .'a color emoji of .*{message}"):
        module(samples_of(rows))
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "cache", rows, module)


def test_without_a_data_processor_rows_are_the_templates_inputs(of_kind, rows_of):
    samples = samples_of(rows_of("kv_cache"))
    with_processor = of_kind("kv_cache").load()(samples)
    without = of_kind("kv_cache", ("TEMPLATE_DATA_PROCESSOR = Processor", ""), folder="other").load()(samples)
    assert torch.equal(with_processor, without)


# What a template returns ----------------------------------------------------------------------------------------------

KV = 'return {"kv_cache": {name: (view(k), view(v)) for name, (k, v) in pairs.items()}}'
BAD = [
    (KV, "return pairs['block_0']", "forward returns a tuple, expected a dict"),
    (
        KV,
        "return {'kv_cach': 1}",
        "returns 'kv_cach', which QwenImagePipeline.model_fn does not take; nearest: 'kv_cache'",
    ),
    (KV, "return {'input_image': 1}", "returns 'input_image', which QwenImagePipeline.model_fn does not take"),
    (KV, "return {'dit': 1}", "returns 'dit', which"),
    (KV, "return {'kv_cache': {'single_0': pairs['block_0']}}", "kv_cache has 'single_0', which is no block of Qwen"),
    (KV, "return {'kv_cache': pairs}", r"kv_cache\['block_0'\] has k \(3, 128\) and v \(3, 128\); expected two of"),
    (KV, KV.replace("view(k)", "view(k) / 0"), r"kv_cache\['block_0'\] k holds NaN or infinite values"),
    ('blocks=("block_0",', 'blocks=("block_9",', "kv_cache has 'block_9', which is no block"),
]


@pytest.mark.parametrize("old, new, message", BAD)
def test_what_the_base_cannot_read_is_refused_before_its_weights_are_read(
    old, new, message, tmp_path, no_weights_are_read
):
    folder, rows = (
        templates.write(tmp_path / "template", templates.SCALE, (old, new)),
        templates.write_rows(tmp_path / "rows"),
    )
    with pytest.raises(ValueError, match=f"{folder}/model.py.*{message}"):
        tiny.train(tmp_path / "out", *templates.overrides(folder, rows))


def test_the_second_stage_tries_the_template_on_what_the_first_made(tmp_path, monkeypatch):
    rows, data = ["dataset=cache", f"dataset.path={tmp_path / 'cache'}"], templates.write_rows(tmp_path / "rows")
    folder = templates.write(tmp_path / "template", IMAGE_TO_LORA.replace("attn.to_q", "attn.to_qq"))
    (data / "metadata.jsonl").write_text(
        (data / "metadata.jsonl").read_text().replace('"scale": 0.', '"image": "0.png", "x": 0.')
    )
    overrides = templates.overrides(folder, data)
    tiny.make_cache(tmp_path / "cache", *overrides)
    monkeypatch.setattr("diffsynth.diffusion.pipeline.networks.load_weights", None)
    with pytest.raises(ValueError, match="lora: .*transformer_blocks.0.attn.to_qq.* belongs to no layer"):
        tiny.train(tmp_path / "out", *overrides[:3], *rows)


def test_other_names_of_the_prediction_may_be_returned(of_kind, rows_of):
    """What a template says of the text takes the place of what the text encoder says."""
    change = ('return {"extra_text_embedding": (1 + scale) * self.tokens[:, :count]}',
              'return {"prompt_emb": self.tokens, "prompt_emb_mask": torch.ones(1, 4, dtype=torch.bool)}')  # fmt: skip
    module, samples = of_kind("text", change).load(), samples_of(rows_of("text"))
    found = module(samples)
    for sample in samples:
        sample.data["prompt"] = "something else"
    assert torch.equal(module(samples), found) and gradients(module, samples).keys() == {"pipe.template_model.tokens"}


def test_samples_that_do_not_stack_are_named_with_the_remedy(of_kind, rows_of):
    change = ('"count": 2', '"count": 1 + round(scale * 8)')
    module, samples = of_kind("text", change).load(), samples_of(rows_of("text"))
    with pytest.raises(
        ValueError, match=r"extra_text_embedding: shapes \(1, 1, 128\), \(1, 2, 128\).*micro_batch_size=1"
    ):
        module(samples)
    assert module(samples[:1]).isfinite().all()


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """`run(*overrides)`: the folder of a run that trains the small template."""
    folder, rows = templates.write(tmp_path / "template", templates.SCALE), templates.write_rows(tmp_path / "rows")

    def train(*overrides: str, root: str = "runs") -> Path:
        return tiny.train(tmp_path / root, *tiny.merged(templates.overrides(folder, rows), overrides))

    return train


def test_a_run_from_a_cache_needs_no_encoders_and_gives_the_same_curve(run, tmp_path):
    images = run()
    tiny.make_cache(tmp_path / "cache", *templates.overrides(tmp_path / "template", tmp_path / "rows"))
    absent = [f"model.{name}=null" for name in ("vae", "text_encoder", "tokenizer")]
    cached = run("dataset=cache", f"dataset.path={tmp_path / 'cache'}", *absent, root="cached")
    curves = [[line["loss"] for line in tiny.metrics(folder)] for folder in (images, cached)]
    assert curves[1] == pytest.approx(curves[0], **CLOSE)


def test_the_task_trains_the_template_and_no_adapter():
    cfg = tiny.compose("train", "task=template", "template.path=somewhere")
    assert cfg.lora == {} and cfg.task.trainable_models == ["template_model"] and cfg.template.path == "somewhere"
    assert tiny.compose("train", "task=template", "lora=lora").lora.rank == 32
    assert tiny.compose("make_cache", "task=template").lora == {}


def test_a_run_without_a_template_says_where_to_name_it(run):
    with pytest.raises(
        ValueError, match="template.path is None; expected the folder of the one template that is trained"
    ):
        run("template.path=null")


EVALUATING = [
    "validation=base",
    "validation.prompts=[a red apple]",
    "validation.options={height: 32, width: 32, num_inference_steps: 2, cfg_scale: 2.0}",
    "validation.loss_samples=2",
    "validation.row_samples=3",
    "+validation.datasets.held_out={_target_: diffsynth.core.data.UnifiedDataset.from_folder, height: 32, width: 32}",
    "+validation.datasets.held_out.metadata=metadata.jsonl",
]


def test_rows_are_sampled_with_their_inputs(run, tmp_path):
    run_dir = run(
        *EVALUATING, f"+validation.datasets.held_out.path={tmp_path / 'rows'}", "optimizer.eps=1e-8", "optimizer.lr=0.5"
    )
    names = {path.name for path in (run_dir / "samples").iterdir()}
    assert {"held_out_step-000000.png", "held_out_step-000002.png", "held_out_progress.png", "progress.png"} <= names
    first, last = (Image.open(run_dir / "samples" / f"held_out_step-{step:06d}.png") for step in (0, 2))
    assert first.width == 3 * 128  # 32 pixels enlarged
    pictures = [image.crop((0, 0, 384, 128)).tobytes() for image in (first, last)]
    assert pictures[0] != pictures[1]  # what was trained is seen


def test_evaluating_changes_nothing(run, tmp_path):
    seen = run(*EVALUATING, f"+validation.datasets.held_out.path={tmp_path / 'rows'}")
    files = [run_dir / "weights" / "epoch-0.safetensors" for run_dir in (seen, run(root="unseen"))]
    first, second = map(load_file, files)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_does_not_go_on_with_another_template(run, tmp_path):
    steps = ["max_steps=3", "checkpoint.every=1"]
    overrides = tiny.merged(templates.overrides(tmp_path / "template", tmp_path / "rows"), steps)
    tiny.cut_off(2, tmp_path / "runs", *overrides)
    templates.write(tmp_path / "template", templates.SCALE, ("length=3", "length=4"))
    with pytest.raises(ValueError, match="files of the template: model.py: its fingerprint was"):
        run(*steps)


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(run, tmp_path):
    steps = ["max_steps=3", "checkpoint.every=1", "optimizer.eps=1e-8"]
    tiny.cut_off(
        2, tmp_path / "runs", *tiny.merged(templates.overrides(tmp_path / "template", tmp_path / "rows"), steps)
    )
    broken, whole = run(*steps), run(*steps, root="whole")
    found, expected = (load_file(run_dir / "weights" / "epoch-0.safetensors") for run_dir in (broken, whole))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_workers_read_the_inputs(run):
    plain, workers = run(), run("dataset.num_workers=2", root="workers")
    assert tiny.metrics(plain)[1]["loss"] == tiny.metrics(workers)[1]["loss"]


def test_running_statistics_are_refused_where_they_would_be_trained(of_kind):
    norm = "self.mlp = torch.nn.Sequential(torch.nn.Linear(6, 2 * 2 * 128), torch.nn.BatchNorm1d(512))"
    change = ("self.mlp = torch.nn.Linear(6, 2 * 2 * 128)", norm)
    with pytest.raises(ValueError, match="model.py: mlp.1 is a BatchNorm1d that is trained; its running statistics"):
        of_kind("part", change)


def test_a_part_that_is_not_there_is_answered_with_those_there_are(tmp_path):
    folder = templates.write(tmp_path / "template", templates.FROZEN_PART)
    expected = "'template_model.mpl'; set task.trainable_models to some of template_model.encoder, template_model.mlp"
    with pytest.raises(ValueError, match=expected):
        training(folder, "template_model.mpl")


@pytest.mark.slow
def test_two_processes_train_as_one(run, tmp_path):
    one = run()
    overrides = tiny.merged(
        tiny.train_overrides(tmp_path / "two"), templates.overrides(tmp_path / "template", tmp_path / "rows")
    )
    assert warm.ranks(2, tiny.run, overrides) == [0, 0]
    (two,) = (tmp_path / "two").iterdir()
    curves = [[line["loss"] for line in tiny.metrics(run_dir)] for run_dir in (one, two)]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
