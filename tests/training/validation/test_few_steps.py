"""A few-step student beside its teacher: what is measured, shown, kept, and refused."""

import json
import logging
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from diffsynth.core.data import CachedDataset
from diffsynth.core.loader import ModelConfig
from diffsynth.diffusion.distillation.settings import Student, Teacher
from diffsynth.diffusion.loss import DirectDistill
from diffsynth.diffusion.pipeline.media import ImageMedia
from diffsynth.diffusion.rewards import ClipScore
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.pipelines.qwen_image import QwenImagePipeline
from diffsynth.training.validation.few_steps import FewSteps
from diffsynth.training.validation.metrics import Retrieval
from diffsynth.training.validation.validation import Validation

PROMPTS = ["a", "a red emoji", "a blue emoji of a bicycle"]
TEACHER = {"num_inference_steps": 4, "cfg_scale": 3.0}
HOW = ["task=distill", "task.student.num_inference_steps=2"]
HOW += [f"task.teacher.{name}={value}" for name, value in TEACHER.items()]
BOTH = ["max_steps=2", "validation.every=1", "ema=constant", "validation.weights=[raw,ema]"]
BOTH += ["export.keep_best=student_distance", "export.save_steps=2", "checkpoint.every=1"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """The teacher's pictures: `train`, and `held_out` of seeds from 100 on."""
    folder = tmp_path_factory.mktemp("teacher")
    for name, first_seed in {"train": 0, "held_out": 100}.items():
        sample(folder / name, f"dataset.first_seed={first_seed}")
    return folder


def sample(folder: Path, *overrides: str) -> None:
    prompts = folder.with_suffix(".txt")
    prompts.write_text("\n".join(PROMPTS))
    size = ["dataset.height=32", "dataset.width=32"]
    tiny.make_cache(folder, *HOW, "dataset=prompts", f"dataset.path={prompts}", *size, *overrides)


def evaluating(teacher: Path, *overrides: str) -> list[str]:
    """A training that evaluates on three rows and shows two of them."""
    small = ["validation=few_steps", "validation.few_steps.pictures=2", "validation.few_steps.batch_size=2"]
    data = [f"dataset.path={teacher}/train", f"validation.few_steps.dataset.path={teacher}/held_out"]
    return [*HOW, "dataset=cache", "optimizer.lr=0.01", *small, *data, *overrides]


@pytest.fixture(scope="module")
def run_dir(teacher, tmp_path_factory) -> Path:
    """A run of two steps, evaluated before each step and after the last."""
    return tiny.train(tmp_path_factory.mktemp("run"), *evaluating(teacher, *BOTH))


@pytest.fixture
def compared(teacher):
    """`compared(held_out, task…)`: a training that is about to begin, and its comparison."""
    roles = {"student": Student(num_inference_steps=2), "teacher": Teacher(**TEACHER)}

    def build(held_out=teacher / "held_out", options=None, **task):
        configs = {name: ModelConfig(path=str(tiny.model() / part)) for name, part in tiny.COMPONENTS.items()}
        pipe = QwenImagePipeline.from_components(**configs, torch_dtype="float32")
        module = PipelineTrainingModule(pipe, DirectDistill(**{**roles, **task}))
        few_steps = FewSteps(lambda: CachedDataset(str(held_out)), pictures=2, **(options or {}))
        few_steps.open()
        return module.load(also=few_steps.models(module), cached=True), few_steps

    return build


def evaluations(run_dir: Path) -> list[dict]:
    return [line for line in tiny.metrics(run_dir) if "student_distance" in line]


def sampled(pipe, settings: dict) -> list[torch.Tensor]:
    """The latents that a pipeline samples for the held-out rows, each alone, from prompt and seed."""
    requests = [{"prompt": prompt, "height": 32, "width": 32, **settings} for prompt in PROMPTS]
    seeded = [{**request, "seed": seed} for seed, request in enumerate(requests, 100)]
    return [pipe.denoise(*pipe.prepare([request])) for request in seeded]


def distance(name: str, found: list[torch.Tensor], teachers: list[torch.Tensor]) -> dict[str, float]:
    each = [(own - other).square().mean().item() for own, other in zip(found, teachers, strict=True)]
    return {f"{name}_distance": mean(each), f"{name}_distance_error": stdev(each) / len(each) ** 0.5}


# What is measured -----------------------------------------------------------------------------------------------------


def test_distances_are_those_of_sampling_row_by_row(run_dir, load_pipe):
    pipe, few = load_pipe(tiny.model()), {"num_inference_steps": 2, "cfg_scale": 1}
    teachers = sampled(pipe, TEACHER)
    base, guided = sampled(pipe, few), sampled(pipe, {**few, "cfg_scale": 3.0})
    wanted = distance("base", base, teachers) | distance("base_guided", guided, teachers)
    first, *_, last = evaluations(run_dir)
    assert {name: first[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    untrained = distance("student", base, teachers)
    assert {name: first[name] for name in untrained} == pytest.approx(untrained, rel=1e-4)
    pipe.load_adapter(run_dir / "weights" / "step-2.safetensors")
    trained = distance("student", sampled(pipe, few), teachers)
    assert {name: last[name] for name in trained} == pytest.approx(trained, rel=1e-4)
    assert trained["student_distance"] != pytest.approx(untrained["student_distance"], rel=1e-3)


def test_the_base_is_measured_once_the_student_and_its_average_at_every_evaluation(run_dir):
    lines = evaluations(run_dir)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [any("base" in name for name in line) for line in lines] == [True, False, False]
    assert not any("ema_base" in name for name in lines[0])
    assert lines[0]["ema_student_distance"] == lines[0]["student_distance"]
    assert lines[2]["ema_student_distance"] != lines[2]["student_distance"]


def test_the_nearest_student_is_kept(run_dir):
    best = json.loads((run_dir / "weights" / "best.json").read_text())
    assert best["value"] == min(line["student_distance"] for line in evaluations(run_dir))


def test_the_student_is_sampled_with_its_own_settings_and_the_base_as_ever(compared, tmp_path, load_pipe):
    own = {"sigmas": [1.0, 0.6, 0.3]}
    module, few_steps = compared(student=Student(num_inference_steps=3, **own))
    pipe, few = load_pipe(tiny.model()), {"num_inference_steps": 3, "cfg_scale": 1}
    wanted = [distance("base", sampled(pipe, few), sampled(pipe, TEACHER))]
    wanted += [distance("student", sampled(pipe, {**few, **own}), sampled(pipe, TEACHER))]
    found = few_steps.start(module, tmp_path) | few_steps.evaluate(module, tmp_path, 0)[0]
    for numbers in wanted:
        assert {name: found[name] for name in numbers} == pytest.approx(numbers, rel=1e-4)


def test_a_student_that_adds_fresh_noise_takes_it_from_the_rows_seeds(compared, load_pipe):
    settings = Student(num_inference_steps=3, renoise=True).settings
    module, few_steps = compared()
    torch.testing.assert_close(few_steps.sample(module, settings), sampled(load_pipe(tiny.model()), settings), **CLOSE)


def test_rows_of_several_sizes_are_sampled_in_batches_of_one(tmp_path, compared):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    node = f"_target_: diffsynth.core.data.prompt_dataset, path: {tmp_path}/prompts.txt, height: 32"
    parts = [f"+dataset.datasets.{name}={{{node}, width: {width}}}" for name, width in {"a": 32, "b": 48}.items()]
    tiny.make_cache(tmp_path / "held_out", *HOW, "dataset=mixed", *parts)
    module, few_steps = compared(tmp_path / "held_out", {"batch_size": 2})
    together = few_steps.sample(module, TEACHER)
    assert [tuple(latents.shape) for latents in together] == [(1, 16, 4, 4)] * 3 + [(1, 16, 4, 6)] * 3
    made = [few_steps.rows[number].made["shared"]["input_latents"] for number in range(6)]
    torch.testing.assert_close(together, made, **CLOSE)


def test_metrics_compare_with_the_teachers_pictures_and_those_that_lack_weights_are_left_out(compared, caplog):
    clip = ClipScore(ModelConfig(path="nowhere"))
    module, few_steps = compared(options={"metrics": {"clip_score": clip, "retrieval": Retrieval()}})
    with caplog.at_level(logging.WARNING):
        validation = Validation("samples", few_steps=few_steps)
        validation.check(None)
    assert "validation.few_steps.metrics.clip_score is left out" in caplog.text
    assert validation.metric_names == ["student_distance", "student_retrieval"]
    exact, shifted = few_steps.sample(module, TEACHER), few_steps.sample(module, TEACHER)
    shifted.append(shifted.pop(0))
    assert few_steps.measure(module.pipe, "student", exact)["student_retrieval"] == 1
    assert few_steps.measure(module.pipe, "student", shifted)["student_retrieval"] == 0


# What is shown and kept -----------------------------------------------------------------------------------------------


def test_what_is_shown_are_the_thumbnails_of_the_familys_media(compared, monkeypatch):
    monkeypatch.setattr(ImageMedia, "thumbnail", lambda self, value: Image.new("RGB", value.size, "red"))
    module, few_steps = compared()
    red = np.asarray(few_steps._show(module, few_steps.sample(module, TEACHER), 0))[:128]
    assert (red == (255, 0, 0)).all()


def test_every_evaluation_is_a_picture_with_a_column_per_prompt(run_dir):
    shown = [Image.open(path) for path in sorted((run_dir / "samples").glob("few_steps_step-*.png"))]
    assert len(shown) == 3 and {picture.width // 128 for picture in shown} == {2}
    assert Image.open(run_dir / "samples" / "few_steps_progress.png").height == sum(each.height for each in shown)
    assert (run_dir / "samples" / "ema_few_steps_progress.png").exists()


def test_the_lines_are_teacher_base_and_student(compared, tmp_path):
    module, few_steps = compared()
    assert lines(few_steps.evaluate(module, tmp_path, 1)[1]) == 2  # where nothing of the base was kept
    few_steps.base = None
    few_steps.start(module, tmp_path)
    picture = few_steps.evaluate(module, tmp_path, 0)[1]
    again = compared()[1].evaluate(module, tmp_path, 0)[1]
    assert lines(picture) == 3 and again.tobytes() == picture.tobytes()


def lines(picture: Image.Image) -> int:
    return picture.height // 128


def steady(run_dir: Path) -> list[dict]:
    machine = ("samples_per_second", "memory_gb")
    return [{name: n for name, n in line.items() if name not in machine} for line in tiny.metrics(run_dir)]


def pictures(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / "samples").glob("*.png")}


@pytest.mark.slow  # training/test_resume.py compares pictures of a run that was cut off
def test_a_run_that_was_cut_off_measures_and_shows_the_same(teacher, run_dir, tmp_path):
    tiny.cut_off(1, tmp_path, *evaluating(teacher, *BOTH))
    resumed = tiny.train(tmp_path, *evaluating(teacher, *BOTH))
    assert resumed.name == run_dir.name
    assert steady(resumed) == steady(run_dir) and pictures(resumed) == pictures(run_dir)


# What is refused ------------------------------------------------------------------------------------------------------

FOLDER = f"_target_: diffsynth.core.data.UnifiedDataset.from_folder, path: {tiny.dataset()}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [
                "task=sft",
                "dataset=image_folder",
                f"dataset.path={tiny.dataset()}",
                "dataset.height=32",
                "dataset.width=32",
            ],
            "few_steps compares a student with its teacher, but FlowMatchSFT has neither",
        ),
        (["validation.few_steps.dataset.path={tmp}/nothing"], "nothing"),
        ([f"validation.few_steps.dataset={{{FOLDER}}}"], "UnifiedDataset; expected a CachedDataset"),
        (["export.keep_best=studnet_distance"], "set export.keep_best to one of student_distance"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_weights_are_read(overrides, message, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("diffsynth.diffusion.pipeline.networks.load_weights", None)
    own = [override.replace("{tmp}", str(tmp_path)) for override in overrides]
    with pytest.raises(ValueError, match=message):
        tiny.train(tmp_path, *tiny.merged(evaluating(teacher, "data_report.pictures=0"), own))


def test_pictures_of_another_teacher_are_refused(compared, monkeypatch):
    monkeypatch.setattr("diffsynth.diffusion.pipeline.networks.load_weights", None)
    with pytest.raises(
        ValueError,
        match="held_out was not made for this training:\n  TeacherSampler: the cache was made with teacher.num_",
    ):
        compared(teacher=Teacher(num_inference_steps=3, cfg_scale=3.0))
