"""A few-step student samples with fresh noise at each step if it learned so, and in the steps that its weights name."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_flux2
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffsynth.config import build
from diffsynth.core.data import generator
from diffsynth.core.loader import ModelConfig
from diffsynth.diffusion.adapters.formats import FORMATS
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.distillation.settings import Student
from diffsynth.diffusion.flow_match import FlowMatchScheduler
from diffsynth.diffusion.logger import ModelLogger
from diffsynth.diffusion.loss import DirectDistill, FlowMatchSFT
from diffsynth.diffusion.pipeline import networks as models
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.pipelines.flux2_image import flux2_sigmas
from diffsynth.pipelines.qwen_image import QwenImagePipeline
from diffsynth.training.accelerator import make_accelerator

SIZE = {"height": 32, "width": 48}
RENOISED = {"prompt": "a red apple", "seed": 3, "num_inference_steps": 3, "cfg_scale": 1, "sampler": "renoise", **SIZE}
ALIKE = {"atol": 1e-4, "rtol": 1e-4}
LAYER = "transformer_blocks.0.attn.to_q"
MODEL = {"num_inference_steps": 30, "cfg_scale": 4.0, "sigmas": None, "sampler": "euler"}  # what the model itself says
STUDENT = {"num_inference_steps": 3, "cfg_scale": 1, "sigmas": None, "sampler": "euler"}


# Fresh noise at every step --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def families() -> dict:
    """A pipeline of each family, used for sampling only."""
    pipes = {"qwen_image": untrained(), "flux2": tiny_flux2.pipeline()}
    for pipe in pipes.values():
        pipe.load_models()
        pipe.progress_bar = iter
    return pipes


@pytest.fixture(params=["qwen_image", "flux2"])
def family(request, families):
    return families[request.param]


@pytest.fixture
def pipe(families):
    return families["qwen_image"]


def untrained() -> QwenImagePipeline:
    configs = {name: ModelConfig(path=str(tiny.model() / part)) for name, part in tiny.COMPONENTS.items()}
    return QwenImagePipeline.from_components(**configs, torch_dtype="float32")


def end(pipe, *requests: dict) -> torch.Tensor:
    """The latents (B, …) that requests end with."""
    return pipe.denoise(*pipe.prepare(requests))


@torch.no_grad()
def test_each_step_goes_to_the_data_and_back_with_noise_of_the_seed(family):
    shared, posi, _ = family.prepare([RENOISED])
    latents, (first, second, third) = shared["latents"], family.scheduler.sigmas.tolist()
    for index, (sigma, following) in enumerate([(first, second), (second, third), (third, 0.0)]):
        velocity = family.predict(torch.tensor([1000 * sigma]), **{**shared, **posi, "latents": latents})
        fresh = torch.randn(latents.shape[1:], generator=generator(3, "renoise", 0, index))
        latents = (1 - following) * (latents - sigma * velocity) + following * fresh
    torch.testing.assert_close(end(family, RENOISED), latents, **ALIKE)
    assert (latents - end(family, {**RENOISED, "sampler": "euler"})).abs().max() > 0.1


def test_where_the_velocity_is_exact_a_step_ends_at_the_data_noised_anew():
    scheduler, (clean, noise, fresh) = FlowMatchScheduler(flux2_sigmas), torch.randn(3, 1, 2, 2, 2)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.25])
    noised = 0.25 * clean + 0.75 * noise
    found = [scheduler.renoise_step(noise - clean, index, x, fresh) for index, x in [(1, noised), (2, clean)]]
    torch.testing.assert_close(found[0], 0.75 * clean + 0.25 * fresh)
    torch.testing.assert_close(found[1], clean - 0.25 * (noise - clean))  # the last one ends at the data


def test_one_step_adds_no_further_noise(pipe):
    once = {**RENOISED, "num_inference_steps": 1}
    assert torch.equal(end(pipe, once), end(pipe, {**once, "sampler": "euler"}))


def test_a_seed_samples_its_picture_again_alone_or_in_company(family):
    seeds = [{**RENOISED, "seed": seed} for seed in (3, 4)]
    together = end(family, *seeds)
    torch.testing.assert_close(together, torch.cat([end(family, own) for own in seeds]), **ALIKE)
    assert torch.equal(end(family, RENOISED), end(family, RENOISED))
    assert (together[0] - together[1]).abs().max() > 0.1


def test_without_a_seed_each_sample_is_another(pipe):
    shared, posi, nega = pipe.prepare([{**RENOISED, "seed": None}])
    assert (pipe.denoise(shared, posi, nega) - pipe.denoise(shared, posi, nega)).abs().max() > 0.1


def test_a_mask_is_refused_as_nothing_could_be_kept(pipe):
    image = Image.new("RGB", (48, 32))
    with pytest.raises(
        ValueError, match="inpaint_mask needs .* sampler=renoise .*; set sampler=euler, or leave the mask out"
    ):
        pipe.generate([{**RENOISED, "input_image": image, "inpaint_mask": image.convert("L")}])


# What exports bring ---------------------------------------------------------------------------------------------------


def student(**options) -> DirectDistill:
    return DirectDistill(student=Student(**{"num_inference_steps": 3, **options}))


@functools.cache
def trained() -> PipelineTrainingModule:
    """An adapter that does something."""
    module = PipelineTrainingModule(untrained(), FlowMatchSFT(), LoRA(rank=2, target_modules=[LAYER])).load()
    for parameter in module.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


@functools.cache
def exported(task=None, seed: int = 0, **options) -> Path:
    """The file that a training of that task leaves."""
    module, logger = trained(), ModelLogger(tiny.kept_folder(), **options)
    module.task = task or FlowMatchSFT()
    for parameter in module.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(seed))
    logger.save(make_accelerator("cpu", "float32"), module, "step-1")
    return logger.saved[0]


def says(pipe, **request) -> dict:
    """How a request is sampled."""
    whole = pipe.complete(request)
    return {name: whole[name] for name in pipe.sampling_arguments}


@pytest.mark.parametrize("options", [*({"formats": (names,)} for names in FORMATS), {"remove_prefix_in_ckpt": "pipe."}])
def test_a_students_adapter_brings_its_settings_under_any_names(options):
    pipe = untrained()
    assert says(pipe) == MODEL
    pipe.use_sampling_settings_of(exported(student(), **options))
    assert says(pipe) == STUDENT


def test_a_call_that_says_nothing_samples_as_the_student_does():
    pipe, steps = untrained(), []
    pipe.load_models()
    pipe.load_adapter(exported(student()))
    pipe.decode = lambda latents, request: latents
    sampled = pipe(
        "a red apple", seed=3, **SIZE, progress_bar_cmd=lambda timesteps: steps.extend(timesteps) or timesteps
    )
    assert len(steps) == 3
    torch.testing.assert_close(sampled, end(pipe, {**RENOISED, "sampler": "euler"}))


def test_what_a_request_says_itself_counts():
    pipe = untrained()
    pipe.use_sampling_settings_of(exported(student(sigmas=(1.0, 0.7, 0.4))))
    assert says(pipe) == {**STUDENT, "sigmas": [1.0, 0.7, 0.4]}
    assert says(pipe, num_inference_steps=8) == {**STUDENT, "num_inference_steps": 8}  # not at levels for 3 steps
    assert says(pipe, sigmas=[1.0, 0.5])["sigmas"] == [1.0, 0.5]
    pipe.use_sampling_settings({**STUDENT, "sampler": "renoise"})
    assert says(pipe, cfg_scale=2) == {**STUDENT, "sigmas": [1.0, 0.7, 0.4], "cfg_scale": 2}  # the adapter's before


def test_an_adapter_that_says_nothing_changes_nothing(tmp_path):
    pipe = untrained()
    save_file(load_file(exported()), tmp_path / "foreign.safetensors")
    for file in (exported(), tmp_path / "foreign.safetensors"):
        pipe.use_sampling_settings_of(file)
    assert says(pipe) == MODEL


@pytest.mark.parametrize("student_first", [True, False])
def test_a_students_adapter_and_a_style_add_up_and_the_student_says_how_to_sample(student_first):
    pipe, files = untrained(), [exported(student()), exported(seed=1)]
    pipe.load_models(["dit"])
    noise, layer = torch.randn(2, 128), pipe.dit.get_submodule(LAYER)
    expected = layer(noise)
    for file in files:
        down, up = (tensor for _, tensor in sorted(load_file(file).items()) if tensor.dim() == 2)
        expected = expected + noise @ down.T @ up.T
    for file in files if student_first else reversed(files):
        pipe.load_adapter(file)
    torch.testing.assert_close(pipe.dit.get_submodule(LAYER)(noise), expected, **ALIKE)
    assert says(pipe) == STUDENT


def test_students_that_sample_alike_go_together_and_others_are_named_unless_the_request_decides():
    pipe, file, other = untrained(), exported(student()), exported(student(num_inference_steps=5))
    for path in (file, exported(student(), seed=1)):
        pipe.use_sampling_settings_of(path)
    assert says(pipe) == STUDENT
    pipe.use_sampling_settings_of(other)
    message = f"{file} was .* num_inference_steps=3, {other} with num_inference_steps=5: .*options.num_inference_steps"
    with pytest.raises(ValueError, match=message):
        pipe.generate([{"prompt": "a", **SIZE}])
    assert says(pipe, num_inference_steps=4) == {**STUDENT, "num_inference_steps": 4}


# Through the scripts --------------------------------------------------------------------------------------------------


def script(entry: str, *overrides: str) -> list[Path]:
    """What a script does, in this process."""
    cfg = tiny.compose(entry, *tiny.merged(tiny.model_overrides(), overrides))
    return tiny.call(entry, cfg)


@pytest.fixture
def sampled(tmp_path):
    """The sampling settings that generate.py reports, and the pixels."""

    def sample(*overrides: str) -> tuple[dict, np.ndarray]:
        options = [
            "prompt=an apple",
            "options.height=32",
            "options.width=32",
            f"output={tmp_path}/sampled",
            "overwrite=true",
            "device=cpu",
        ]
        (path,) = script("generate", *options, *overrides)
        image = Image.open(path)
        kept = json.loads(image.text["parameters"])
        return {name: kept[name] for name in MODEL}, np.array(image, dtype=int)

    return sample


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Images with the seeds that they were sampled from."""
    folder = tiny.write_dataset(tmp_path_factory.mktemp("sampled") / "data", count=4)
    rows = [{"image": f"{n}.png", "prompt": f"a {n}", "seed": n, "rand_device": "cpu"} for n in range(4)]
    return tiny.write_rows(folder, rows)


DISTILL = ["task=distill", "task.teacher=null", "task.student.num_inference_steps=3", "max_steps=1"]
EXPLICIT = ["options.num_inference_steps=3", "options.cfg_scale=1"]


def weights_of(folder: Path, data: Path, *overrides: str) -> Path:
    run_dir = tiny.train(folder, f"dataset.path={data}", *DISTILL, *overrides)
    (file,) = (run_dir / "weights").glob("*.safetensors")
    return file


def test_a_trained_adapter_needs_no_hints_and_neither_does_what_it_is_merged_into(data, sampled, tmp_path):
    file = weights_of(tmp_path / "run", data, "optimizer.lr=0.05")
    found, pixels = sampled(f"lora_path={file}")
    told, the_same = sampled(f"lora_path={file}", *EXPLICIT)
    assert found == told == STUDENT and np.array_equal(pixels, the_same)
    (merged,) = script("fuse", f"lora_path={file}", f"output={tmp_path}/merged")
    found, again = sampled(f"model.dit.path={merged}")
    assert found == STUDENT and np.abs(pixels - again).max() <= 1


def test_a_fully_trained_student_needs_no_hints(data, sampled, tmp_path):
    file = weights_of(tmp_path / "run", data, "lora=none", "optimizer.lr=1e-3")
    model = [f"model.dit.path={file}", f"model.dit.config={tiny.model()}/transformer"]
    found, pixels = sampled(*model)
    assert found == STUDENT and np.array_equal(pixels, sampled(*model, *EXPLICIT)[1])


def test_a_merged_student_stays_one_and_an_adapter_of_its_own_comes_first(tmp_path):
    (merged,) = script("fuse", f"lora_path={exported(student())}", f"output={tmp_path}/merged")
    (both,) = script("fuse", f"model.dit.path={merged}", f"lora_path={exported()}", f"output={tmp_path}/both")
    pipe = build(tiny.compose("generate", *tiny.model_overrides(), f"model.dit.path={both}"))["model"]()
    assert says(pipe) == STUDENT
    pipe.use_sampling_settings_of(exported(student(num_inference_steps=2)))
    assert says(pipe) == {**STUDENT, "num_inference_steps": 2}


@pytest.mark.parametrize("entry", ["generate", "fuse"])
def test_adapters_that_sample_differently_are_refused_before_weights_are_read(tmp_path, monkeypatch, entry):
    files = [exported(student(num_inference_steps=steps)) for steps in (3, 5)]
    monkeypatch.setattr(models, "load_weights", None)
    with pytest.raises(ValueError, match=f"{files[0]} .*=3, {files[1]} .*=5: use one of the two, or set options"):
        script(entry, f"lora_path=[{','.join(map(str, files))}]", f"output={tmp_path}/out")


FLUX2 = {
    "emoji_flux2": {"num_inference_steps": 30, "cfg_scale": 4.0},
    "flux2_dev": {"num_inference_steps": 50, "cfg_scale": 1.0},
    "flux2_klein_9b": {"num_inference_steps": 4, "cfg_scale": 1.0},
    "flux2_klein_base_9b": {"num_inference_steps": 50, "cfg_scale": 4.0},
}


@pytest.mark.parametrize("name", FLUX2)
def test_models_of_one_family_are_sampled_each_in_its_own_way(name):
    model, own = tiny.compose("generate", f"model={name}").model, FLUX2[name]
    assert {key: model[key] for key in own} == own
    assert says(tiny_flux2.pipeline(**own)) == {**MODEL, **own}
