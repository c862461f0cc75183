"""`python distill.py`: a teacher samples images, and a student is trained on them, on the embedded model."""

from pathlib import Path

import pytest
import tiny
from PIL import Image

import distill
from diffsynth.config import signature
from diffsynth.core.data import CachedDataset, UnifiedDataset

TEACHER = ["task.teacher.num_inference_steps=4", "task.teacher.cfg_scale=2.0", "task.student.num_inference_steps=2"]
SHORT = ["max_steps=2", "batch_size=2", "logger.every=1", "device=cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("distill")


def overrides(folder: Path, output_root: str = "runs") -> list[str]:
    prompts = folder / "prompts.txt"
    prompts.write_text("a color emoji of red apple\na color emoji of rocket\n")
    data = [f"teacher_path={folder}/teacher", f"prompts.path={prompts}", f"held_out.path={prompts}"]
    seeds = ["prompts.seeds=1", "held_out.seeds=1"]
    return [*data, *seeds, *TEACHER, *SHORT, f"output_root={folder}/{output_root}"]


@pytest.fixture(scope="module")
def run_dir(folder) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        tiny.command_line(patch, "distill.py", *overrides(folder))
    (run_dir,) = (folder / "runs").iterdir()
    assert "2 of TeacherSampler" in (run_dir / "train.log").read_text()
    return run_dir


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in tiny.metrics(run_dir) if "loss" in line]


def test_it_leaves_pictures_of_the_teacher_a_student_and_a_comparison(folder, run_dir):
    seeds = [CachedDataset(f"{folder}/teacher/{name}")[0]["seed"] for name in ("train", "held_out")]
    assert seeds == [0, 1_000_000]
    assert tiny.weights(run_dir) == ["step-2.safetensors"]
    first, *_, last = tiny.metrics(run_dir)
    assert first["base_distance"] == first["student_distance"] != last["student_distance"]
    assert Image.open(run_dir / "samples" / "few_steps_progress.png").width == 2 * 128
    assert "Finished." in (run_dir / "train.log").read_text()


def test_the_same_command_again_says_that_it_is_finished(folder, run_dir, monkeypatch, capsys):
    tiny.command_line(monkeypatch, "distill.py", *overrides(folder))
    said = capsys.readouterr().out
    assert f"{run_dir} is finished" in said and "TeacherSampler" not in said


def test_what_the_teacher_sampled_is_not_sampled_again(folder, run_dir, monkeypatch, caplog):
    monkeypatch.setattr(distill, "train", lambda run: [])
    caplog.set_level("INFO")
    tiny.call("distill", tiny.compose("distill", *overrides(folder, "others"), "seed=1"))
    assert caplog.text.count("made now: none") == 2


def test_it_trains_what_train_trains_on_the_same_pictures(folder, run_dir, monkeypatch):
    data = ["dataset=cache", f"dataset.path={folder}/teacher/train", "validation=none"]
    own = ["task=distill", *data, *TEACHER, *SHORT, "optimizer.lr=2e-3", f"output_root={folder}/train"]
    tiny.command_line(monkeypatch, "train.py", *own)
    assert losses(next((folder / "train").iterdir())) == losses(run_dir)


def test_without_a_teacher_the_data_set_is_used_as_it_is(monkeypatch):
    monkeypatch.setattr(distill, "train", lambda run: run)
    monkeypatch.setattr("make_cache.make_cache", None)
    cfg = tiny.compose("distill", "task.teacher=null", "dataset=image_folder", f"dataset.path={tiny.dataset()}")
    run = tiny.call("distill", cfg)
    assert isinstance(run.dataset, UnifiedDataset) and run.task.teacher is None


def test_where_the_pictures_are_kept_changes_no_result_but_what_is_sampled_does():
    plain = signature(tiny.compose("distill"))
    assert signature(tiny.compose("distill", "teacher_path=elsewhere")) == plain
    assert signature(tiny.compose("distill", "held_out.seeds=3")) == plain  # which is only evaluated
    for override in ("prompts.path=mine.txt", "task.teacher.cfg_scale=2"):
        assert signature(tiny.compose("distill", override)) != plain


def test_a_model_may_have_defaults_for_distillation():
    rates = [tiny.compose("distill", f"model={name}").optimizer.lr for name in ("emoji", "qwen_image")]
    assert rates == [2e-3, tiny.compose("train", "model=qwen_image").optimizer.lr]


def test_a_task_that_is_no_distillation_is_refused_with_the_script_that_runs_it(folder, monkeypatch):
    with pytest.raises(SystemExit, match=r"FlowMatchSFT, which is no distillation: run it by python train\.py"):
        tiny.command_line(monkeypatch, "distill.py", "task=sft", f"output_root={folder}/refused")
