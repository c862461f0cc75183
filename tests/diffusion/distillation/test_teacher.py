"""A teacher's images: sampled by the pipeline from prompts and seeds, kept in a cache, and learned from."""

import contextlib
import dataclasses
import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
import warm
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffsynth.cache import keys as cache_plan
from diffsynth.cache.keys import CacheKeys
from diffsynth.cache.make import CacheReport, launch_data_process_task
from diffsynth.core.data import Augmentation, CachedDataset, Row, Sample, UnifiedDataset, prompt_dataset
from diffsynth.core.data.cache import CacheIndex, keys_of
from diffsynth.core.loader import ModelConfig
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.distillation.settings import Student, Teacher
from diffsynth.diffusion.distillation.teacher_sampler import TeacherSampler, points_on_path
from diffsynth.diffusion.loss import DirectDistill, FlowMatchSFT, RoleDistillation, TrajectoryImitation
from diffsynth.diffusion.pipeline.media import ImageMedia
from diffsynth.diffusion.pipeline.units import run_units
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.pipelines.qwen_image import QwenImagePipeline
from diffsynth.training.accelerator import make_accelerator
from diffsynth.training.checks import scan

TEACHER, STUDENT = Teacher(num_inference_steps=4, cfg_scale=3.0), Student(num_inference_steps=2)
SIZE = {"height": 32, "width": 48}
BATCH = [{"prompt": text, "seed": seed, "rand_device": "cpu", **SIZE} for text, seed in [("a cat", 1), ("", 2)]]
ALIKE = {"atol": 1e-4, "rtol": 1e-4}


# What the teacher samples ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe() -> QwenImagePipeline:
    """A pipeline used for sampling only."""
    pipe = untrained()
    pipe.load_models()
    pipe.progress_bar = iter
    return pipe


def untrained(**models) -> QwenImagePipeline:
    configs = {name: ModelConfig(path=str(tiny.model() / part)) for name, part in tiny.COMPONENTS.items()}
    return QwenImagePipeline.from_components(**configs | models, torch_dtype="float32")


def sampled(pipe, teacher=TEACHER, student=None, batch=BATCH) -> list[dict]:
    return TeacherSampler(pipe, teacher, student).process_batch(pipe, batch)


def test_its_pictures_are_those_that_the_pipeline_samples_from_the_noise_of_their_seeds(pipe):
    made = sampled(pipe)
    requests = [{**TEACHER.settings, **each} for each in BATCH]
    with pipe.sampling():
        expected = pipe.denoise(*pipe.prepare(requests))
    for own, request, end in zip(made, requests, expected, strict=True):
        torch.testing.assert_close(own["input_latents"][0], end, **ALIKE)
        assert torch.equal(own["latents"], pipe.generate_noise((1, 16, 4, 6), request["seed"]))


def test_guidance_and_what_it_leads_away_from_are_the_teachers(pipe):
    plain, guided, away = (
        sampled(pipe, Teacher(num_inference_steps=2, cfg_scale=scale, negative_prompt=text))[0]["input_latents"]
        for scale, text in [(1.0, ""), (4.0, ""), (4.0, "a dog")]
    )
    assert (guided - plain).abs().max() > 1e-3 < (guided - away).abs().max()


def test_a_picture_does_not_depend_on_its_company(pipe):
    other = {**BATCH[0], "height": 48, "width": 32, "seed": 5}
    together = sampled(pipe, student=STUDENT, batch=[BATCH[0], other, BATCH[1]])
    for own, request in zip(together, [BATCH[0], other, BATCH[1]], strict=True):
        alone = TeacherSampler(pipe, TEACHER, STUDENT).process(pipe, **request)
        torch.testing.assert_close(own, alone, **ALIKE)
    assert together[1]["input_latents"].shape == (1, 16, 6, 4)


def test_sampling_leaves_the_noise_levels_of_a_training_as_they_were(pipe):
    pipe.scheduler.set_timesteps(1000, training=True)
    sampled(pipe, student=STUDENT)
    assert len(pipe.scheduler.timesteps) == 1000 and pipe.scheduler.training


def test_settings_that_its_weights_brought_are_not_the_teachers(pipe):
    expected = sampled(pipe)
    with mock.patch.object(
        pipe, "sampling_settings", {None: {"num_inference_steps": 2, "sigmas": [1, 0.5], "sampler": "renoise"}}
    ):
        torch.testing.assert_close(sampled(pipe), expected)


@pytest.mark.parametrize("sigmas", [None, (1.0, 0.5, 0.01)])
def test_a_trajectory_leads_from_the_noise_through_the_students_levels_to_the_picture(pipe, sigmas):
    student = Student(num_inference_steps=4 if sigmas is None else 3, sigmas=sigmas)
    (made, *_) = sampled(pipe, student=student)
    trajectory = made["trajectory"][0]
    with pipe.sampling():
        path = [point[0] for point in pipe.trajectory(*pipe.prepare([{**TEACHER.settings, **each} for each in BATCH]))]
        levels = [*pipe.scheduler.sigmas.tolist(), 0.0]
    assert torch.equal(trajectory[-1], made["input_latents"][0])
    if sigmas is None:  # as many steps as the teacher: the same levels
        assert torch.equal(trajectory[0], made["latents"][0])
        torch.testing.assert_close(trajectory, torch.stack(path))
        return
    for point, sigma in zip(trajectory, [*sigmas, 0.0], strict=True):
        before = max(n for n, level in enumerate(levels[:-1]) if level >= sigma)
        share = (levels[before] - sigma) / (levels[before] - levels[before + 1])
        torch.testing.assert_close(point, path[before] + share * (path[before + 1] - path[before]), **ALIKE)


LEVELS = st.sets(st.integers(1, 999), min_size=1, max_size=8).map(
    lambda found: [1.0, *(n / 1000 for n in sorted(found)[::-1]), 0.0]
)


@given(LEVELS, LEVELS)
def test_a_path_is_found_exactly_where_it_was_passed_and_on_its_lines_between(passed, wanted):
    path = [torch.tensor([sigma**2, 1 / 3 + sigma]) for sigma in passed]  # the second is a line all along
    points = points_on_path(path, passed, wanted)
    assert len(points) == len(wanted)
    for point, sigma in zip(points, wanted, strict=True):
        if sigma in passed:
            assert torch.equal(point, path[passed.index(sigma)])
        low = max(level for level in passed if level <= sigma)
        high = min(level for level in passed if level >= sigma)
        assert low**2 - 1e-6 <= point[0] <= high**2 + 1e-6
        assert point[1].item() == pytest.approx(1 / 3 + sigma, abs=1e-6)


# Prompts --------------------------------------------------------------------------------------------------------------


TEXTS = ["a cat", "a dog, asleep", "红苹果"]


@pytest.fixture
def prompts(tmp_path):
    """`prompts(**options)`: a data set of three prompts of a text file, or of `content` of a file `name`."""

    def read(content: str = "\n".join([TEXTS[0], "", f"  {TEXTS[1]} ", TEXTS[2], ""]), name: str = "p.txt", **options):
        (tmp_path / name).write_text(content, encoding=options.get("encoding", "utf-8"))
        rows = prompt_dataset(str(tmp_path / name), **{"height": 32, "width": 48, **options})
        rows.scan(required=("image", "prompt", "seed"))
        return rows

    return read


def seeds_of(rows) -> list[tuple[str, int]]:
    return [(rows[number]["prompt"], rows[number]["seed"]) for number in range(len(rows))]


def test_each_prompt_is_sampled_from_each_seed_and_counted_seeds_are_never_the_same(prompts):
    assert seeds_of(prompts()) == [("a cat", 0), ("a dog, asleep", 1), ("红苹果", 2)]
    counted = [("a cat", 7), ("a cat", 8), ("a dog, asleep", 9), ("a dog, asleep", 10), ("红苹果", 11), ("红苹果", 12)]
    assert seeds_of(prompts(seeds=2, first_seed=7)) == counted
    assert seeds_of(prompts(seeds=[5, 3])) == [(text, seed) for text in TEXTS for seed in (5, 3)]
    assert prompts()[0]["image"].size == (48, 32)


def test_a_table_gives_its_other_columns_too(prompts):
    rows = prompts("prompt,kind\na cat,animal\n", "p.csv", seeds=2)
    assert {name: rows[1][name] for name in ("prompt", "kind", "seed")} == {
        "prompt": "a cat",
        "kind": "animal",
        "seed": 1,
    }


def test_what_changes_the_pictures_changes_the_fingerprint(prompts):
    changes = [{}, {"content": "a cat"}, {"seeds": 2}, {"seeds": [0]}, {"first_seed": 1}, {"height": 48}]
    found = {json.dumps(options): prompts(**options).fingerprint() for options in changes}
    assert len(set(found.values())) == len(changes) and prompts().fingerprint() == found["{}"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"content": " \n"}, r"prompts \S*p.txt: there are none"),
        ({"content": "prompt\n", "name": "p.csv"}, r"prompts \S*p.csv: there are none"),
        ({"content": "text\na cat", "name": "p.csv"}, "row 1: has no prompt, but text, image, seed"),
        ({"content": "prompt,n\n,1", "name": "p.csv"}, "row 1: prompt is empty"),
        ({"seeds": 0}, "dataset.seeds is 0; expected at least one seed"),
        ({"seeds": -1}, "dataset.seeds is -1"),
        ({"seeds": []}, r"dataset.seeds is \[\]"),
        ({"augmentation": Augmentation(flip=0.5)}, "flip and random_crop change images, and prompts have none"),
        ({"augmentation": Augmentation(random_crop=True)}, "flip and random_crop change images"),
    ],
)
def test_prompts_that_cannot_be_sampled_are_named(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        prompts(**options)


def test_a_file_that_is_not_there_or_in_another_encoding_is_named(prompts, tmp_path):
    with pytest.raises(ValueError, match="gone.txt: not found"):
        prompt_dataset(str(tmp_path / "gone.txt"), 32, 32)
    assert prompts(encoding="gbk")[2]["prompt"] == "红苹果"
    with pytest.raises(ValueError, match="p.txt: .* save it as UTF-8, or set dataset.encoding=gbk"):
        prompt_dataset(str(tmp_path / "p.txt"), 32, 32)


# A cache of them ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def code_is_read_once():
    """It does not change while these tests run, and takes longer to read than all else."""
    read = functools.cache(cache_plan.code_version)
    with mock.patch.object(cache_plan, "code_version", lambda functions, classes: read((*functions,), (*classes,))):
        yield


DIT = LoRA(target_modules=["to_q", "proj_out"], rank=2)
LEARNED = {"teacher": TEACHER, "student": STUDENT}
DIRECT, IMITATION = DirectDistill(**LEARNED), TrajectoryImitation(**LEARNED)


@dataclass(frozen=True, kw_only=True)
class Guided(RoleDistillation):
    """The least that reads a guided teacher."""

    def loss(self, context) -> Tensor:
        velocity = context.velocity("teacher", context.clean, context.rng.uniform("sigma"), self.guidance)
        return velocity.flatten(1).sum(1)


GUIDED = Guided(**LEARNED)


def training(task=DIRECT, lora=DIT) -> PipelineTrainingModule:
    """A training whose models are built, not loaded."""
    return PipelineTrainingModule(untrained(), task, lora)


@functools.cache
def two_prompts() -> Path:
    path = tiny.kept_folder() / "prompts.txt"
    path.write_text("a cat\na dog, asleep\n")
    return path


def rows_of(**options) -> UnifiedDataset:
    """Two prompts, each sampled twice."""
    rows = prompt_dataset(str(two_prompts()), **{"height": 32, "width": 32, "seeds": 2, **options})
    rows.scan()
    return rows


def make(folder: Path, task=DIRECT, rows=None, **options) -> CacheReport:
    accelerator = make_accelerator("cpu", "float32")
    return launch_data_process_task(accelerator, rows or rows_of(), training(task), folder, **options)


def content(folder: Path) -> dict[str, dict]:
    """Every entry of a cache that a sample needs, by key."""
    index = CacheIndex(folder)
    keys = sorted({key for record in index.records() for key in keys_of(record)})
    return {key: index.entries([key])[0] for key in keys}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """`cache(task)`: the folder of a cache of what that task reads, made once."""

    @functools.cache
    def made(task) -> Path:
        folder = tmp_path_factory.mktemp("made") / "cache"
        make(folder, task)
        return folder

    return made


def samples_of(folder: Path) -> list[Sample]:
    cached = CachedDataset(str(folder))
    return [Sample(cached[number], 0, number) for number in range(len(cached))]


def directly(module, pipe) -> list[Sample]:
    """The same samples, of which the units make their part now."""
    samples = []
    for number in range(4):
        row = rows_of()[number]
        sides = run_units(module.frozen_units, pipe, *module.get_pipeline_inputs(row))
        kept = [{name: own[name] for name in module.kept_inputs & own.keys()} for own in sides]
        samples.append(Sample(Row(row, dict(zip(("shared", "posi", "nega"), kept, strict=True))), 0, number))
    return samples


@pytest.mark.parametrize("task", [DIRECT, IMITATION, GUIDED], ids=lambda task: type(task).__name__)
def test_a_training_from_the_cache_sees_what_the_teacher_samples(cache, pipe, task):
    module = training(task).load(cached=True)
    losses = module(samples_of(cache(task)))
    assert module.pipe.text_encoder is None and module.pipe.vae is None
    torch.testing.assert_close(losses, module(directly(module, pipe)), **ALIKE)
    assert losses.shape == (4,) and len(set(losses.tolist())) == 4  # no two rows share their noise


def test_each_picture_is_made_once_whatever_learns_from_it(cache, tmp_path):
    folder = shutil.copytree(cache(GUIDED), tmp_path / "cache")
    assert make(folder, dataclasses.replace(GUIDED, guidance=2.0)).made == {}
    assert make(folder, DIRECT).made == {}
    assert make(folder, rows=rows_of(seeds=3)).made == {"TeacherSampler": 3}  # seeds 2, 4 and 5
    assert make(folder, IMITATION).made == {"TeacherSampler": 4}


def test_the_cache_holds_the_side_that_guidance_leads_away_from(cache):
    (sample, *_) = samples_of(cache(GUIDED))
    assert sample.data.made["nega"].keys() >= {"prompt_emb"} < sample.data.made["posi"].keys()
    plain, guided = (training(task).load(cached=True) for task in (dataclasses.replace(GUIDED, guidance=1.0), GUIDED))
    assert not torch.allclose(*(module([sample]) for module in (plain, guided)))


def test_a_making_that_is_cut_off_goes_on_with_what_lacks(cache, tmp_path):
    sample, left = TeacherSampler._sample, iter([True, True, False])

    def cut_off(unit, pipe, alike):
        if not next(left):
            raise tiny.PowerCut
        return sample(unit, pipe, alike)

    one_by_one = {"batch_size": 1, "shard_bytes": 1}
    with pytest.raises(tiny.PowerCut), mock.patch.object(TeacherSampler, "_sample", cut_off):
        make(tmp_path, **one_by_one)
    with pytest.raises(ValueError, match="is not finished; python make_cache.py"):
        CachedDataset(str(tmp_path))
    assert make(tmp_path, **one_by_one).made["TeacherSampler"] == 2
    torch.testing.assert_close(content(tmp_path), content(cache(DIRECT)), **ALIKE)


@pytest.mark.slow
def test_two_processes_make_the_cache_of_one(tmp_path):
    asked = ["task=distill", "task.teacher.num_inference_steps=4", "dataset=prompts", "dataset.seeds=4"]
    asked += [f"dataset.path={two_prompts()}", "dataset.height=32", "dataset.width=32", "batch_size=2"]
    assert warm.ranks(2, tiny.make_cache, tmp_path / "two", *tiny.model_overrides(), *asked) == [0, 0]
    tiny.make_cache(tmp_path / "one", *asked)
    torch.testing.assert_close(content(tmp_path / "two"), content(tmp_path / "one"), **ALIKE)


# Learning from it -----------------------------------------------------------------------------------------------------


def test_imitation_is_the_sum_of_what_each_step_misses(cache):
    module, samples = training(IMITATION).load(cached=True), samples_of(cache(IMITATION))
    made = samples[1].data.made
    size, steps = {"height": 32, "width": 32}, {"num_inference_steps": 2}
    with module.pipe.sampling_steps({**size, **steps}) as scheduler:
        first, second = scheduler.sigmas.tolist()
    start, middle, end = made["shared"]["trajectory"][0]
    missed = []
    for sigma, following, here, there in [(first, second, start, middle), (second, 0.0, middle, end)]:
        velocity = module.pipe.predict(torch.tensor([1000 * sigma]), **made["posi"], latents=here[None])[0]
        missed.append(((velocity - (there - here) / (following - sigma)) ** 2).mean())
    torch.testing.assert_close(module([samples[1]])[0], sum(missed), **ALIKE)
    displaced = training(dataclasses.replace(IMITATION, displacement=True)).load(cached=True)
    expected = (second - first) ** 2 * missed[0] + second**2 * missed[1]
    torch.testing.assert_close(displaced([samples[1]])[0], expected, **ALIKE)
    torch.testing.assert_close(module(samples), torch.cat([module([own]) for own in samples]), **ALIKE)


@pytest.mark.parametrize("learns", [DirectDistill, TrajectoryImitation])
def test_a_student_that_samples_as_its_teacher_has_nothing_to_learn(learns, pipe, tmp_path):
    task = learns(teacher=Teacher(num_inference_steps=2, cfg_scale=1.0), student=STUDENT)
    make(tmp_path, task, rows_of(seeds=1))
    module, samples = training(task).load(cached=True), samples_of(tmp_path)
    assert module(samples).max() < 1e-9
    for parameter in module.trainable_parameters():
        parameter.data += 0.3
    assert module(samples).min() > 1e-6


# What is refused, before any weight is read ---------------------------------------------------------------------------


def refusal(folder: Path, *overrides: str) -> str:
    """What `python train.py` is refused with."""
    with pytest.raises(ValueError) as refused:
        tiny.train(folder, "task=distill", *overrides)
    return str(refused.value)


def refused(cache: Path, message: str, task=DIRECT, **options) -> None:
    """A training that is not to be had from this cache, as train.py finds out before it reads weights."""
    with pytest.raises(ValueError, match=message):
        rows = CachedDataset(str(cache), **options)
        rows.scan(required=("image", "prompt", *task.columns))
        rows.check_made_for(CacheKeys(training(task)).about)


def with_teacher(**changes):
    return dataclasses.replace(DIRECT, teacher=dataclasses.replace(TEACHER, **changes))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            with_teacher(num_inference_steps=8),
            "TeacherSampler: the cache was made with teacher.num_inference_steps 4, this run has 8",
        ),
        (with_teacher(cfg_scale=4.0), "made with teacher.cfg_scale 3.0, this run has 4.0"),
        (with_teacher(negative_prompt="ugly"), "made with teacher.negative_prompt '', this run has 'ugly'"),
        (
            IMITATION,
            r"student.num_inference_steps None, this run has 2\n(.*\n)*.*the cache holds no trajectory, which this run",
        ),
    ],
)
def test_a_cache_of_another_teacher_is_named_with_what_differs(cache, task, message):
    refused(cache(DIRECT), message, task)


def test_a_cache_of_another_size_or_another_way_of_the_student_is_named(cache):
    refused(
        cache(DIRECT), "has samples of 32 x 32 pixels, but dataset.height=64; set dataset.height=null, or", height=64
    )
    refused(cache(DIRECT), "holds no variant 'mirrored'", augmentation=Augmentation(flip=0.5))
    other = dataclasses.replace(IMITATION, student=Student(num_inference_steps=3))
    refused(
        cache(IMITATION), "TeacherSampler: the cache was made with student.num_inference_steps 2, this run has 3", other
    )


def test_guidance_without_the_negative_side_in_the_cache_is_named(tmp_path):
    teacher = Teacher(num_inference_steps=4, cfg_scale=1.0)
    make(tmp_path, dataclasses.replace(DIRECT, teacher=teacher), rows_of(seeds=1))
    refused(tmp_path, "the cache holds no negative prompt_emb", dataclasses.replace(GUIDED, teacher=teacher))
    unguided = training(dataclasses.replace(GUIDED, teacher=teacher, guidance=1.0))
    CachedDataset(str(tmp_path)).check_made_for(CacheKeys(unguided).about)


def test_the_command_line_names_another_base_and_other_steps(cache, tmp_path, no_weights_are_read):
    root = Path(shutil.copytree(tiny.model() / "transformer", tmp_path / "transformer"))
    (file,) = root.glob("*.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file)
    ours = ["task.teacher.cfg_scale=3.0", "task.student.num_inference_steps=2", "dataset=cache"]
    message = refusal(tmp_path / "run", *ours, f"dataset.path={cache(DIRECT)}", f"model.dit.path={root}")
    assert "TeacherSampler: the cache was made with teacher.num_inference_steps 4, this run has 40\n" in message
    assert "TeacherSampler: the cache was made with dit " in message and "run make_cache.py again with these" in message


def test_a_cache_of_pictures_that_no_teacher_sampled_is_named(tmp_path):
    for name, column in {"plain": {}, "seeded": {"seed": 1}}.items():
        folder = tiny.write_dataset(tmp_path / name, count=1)
        rows = UnifiedDataset.from_folder(
            str(tiny.write_rows(folder, [{"image": "0.png", "prompt": "a", **column}])), height=32, width=32
        )
        make(tmp_path / f"{name} cache", FlowMatchSFT(), rows)
    refused(
        tmp_path / "plain cache",
        "holds no seed, which this task needs; add the column to the data set and run",
    )
    refused(tmp_path / "seeded cache", "TeacherSampler: the cache holds none of its outputs")


def test_a_training_without_the_teachers_pictures_is_told_how_they_are_made(tmp_path, no_weights_are_read):
    message = refusal(tmp_path, "dataset=prompts", f"dataset.path={two_prompts()}")
    assert "The teacher's images are not there: make them with `make_cache.py`" in message
    assert "dataset=cache" in message and "teacher=none" in message


def test_a_student_of_more_steps_than_its_teacher_is_refused(tmp_path, no_weights_are_read):
    message = refusal(tmp_path, "task.student.num_inference_steps=50")
    assert "task.student.num_inference_steps is 50, more than the teacher's 40" in message


def test_what_the_teacher_did_not_have_is_refused(tmp_path):
    pair = {"lora_A": torch.zeros(2, 128), "lora_B": torch.zeros(128, 2)}
    file, layer = tmp_path / "style.safetensors", "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{layer}.{part}.weight": tensor for part, tensor in pair.items()}, file)
    with pytest.raises(ValueError, match=f"lora.preset={file} would be merged into the student, but the teacher's"):
        training(lora=dataclasses.replace(DIT, preset=str(file)))
    with pytest.raises(ValueError, match=r"name \['text_encoder'\]; a distillation trains dit alone"):
        training(lora=LoRA(models=("text_encoder",), target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"name \['dit', 'text_encoder'\]; a distillation trains dit alone"):
        training(dataclasses.replace(DIRECT, trainable_models=["text_encoder"]))


# Pictures that say how they were sampled ------------------------------------------------------------------------------


def sampled_before(folder: Path, **options) -> UnifiedDataset:
    """Rows as the original's guide has them, the third picture larger than the others, as a training reads them."""
    tiny.write_dataset(folder, count=4)
    Image.new("RGB", (48, 48)).save(folder / "2.png")
    how = {"rand_device": "cpu", "num_inference_steps": 2, "cfg_scale": 1}
    tiny.write_rows(folder, [{"image": f"{n}.png", "prompt": f"a {n}", "seed": n, **how} for n in range(4)])
    rows, task = UnifiedDataset.from_folder(str(folder), **options), DirectDistill(student=STUDENT)
    scan(rows, ImageMedia(), task, None)
    return rows


@pytest.mark.parametrize("options", [{"height": 32, "width": 32}, {"max_pixels": 1024}])
def test_a_picture_that_would_be_resized_is_named_with_its_row(tmp_path, options):
    with pytest.raises(
        ValueError, match="row 3: image '2.png': it is 48x48 pixels and would become 32x32, .* its seed"
    ):
        sampled_before(tmp_path / "data", **options)
    assert len(sampled_before(tmp_path / "free")) == 4


@pytest.mark.parametrize("augmentation", [{"flip": 0.5}, {"random_crop": True}])
def test_a_picture_that_a_random_choice_would_change_is_refused(tmp_path, augmentation):
    with pytest.raises(
        ValueError, match="no longer belong to the noise of their seeds; set flip=0 and random_crop=false"
    ):
        sampled_before(tmp_path / "data", augmentation=Augmentation(**augmentation))


def test_the_command_line_refuses_them_before_it_reads_weights(tmp_path, no_weights_are_read):
    with contextlib.suppress(ValueError):
        sampled_before(tmp_path / "data", height=32, width=32)
    message = refusal(tmp_path / "run", "task.teacher=null", f"dataset.path={tmp_path}/data")
    assert "1 of 4 rows" in message and "row 3: image '2.png': it is 48x48 pixels and would become 32x32" in message
