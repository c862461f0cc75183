"""Whole runs of train.py: what they leave, and what may not change it."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
import warm
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from diffsynth.core.data import LoadImage
from diffsynth.core.loader import ModelConfig, load_model
from diffsynth.report.compare import compare

EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in tiny.metrics(run_dir) if "loss" in line]


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """What the last step left."""
    return load_file(run_dir / "weights" / tiny.weights(run_dir)[-1])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The run that the others are compared with: two steps of four samples, all in one forward."""
    return tiny.train(tmp_path_factory.mktemp("plain"))


# What a run leaves ----------------------------------------------------------------------------------------------------


def test_weights_are_saved_by_steps_and_at_the_end(tmp_path):
    run_dir = tiny.train(tmp_path, "export.save_steps=2", "max_steps=3", "batch_size=1")
    assert tiny.weights(run_dir) == ["step-2.safetensors", "step-3.safetensors"]


def test_weights_are_saved_by_epochs(tmp_path):
    run_dir = tiny.train(tmp_path, "max_steps=null", "num_epochs=2", "batch_size=8")
    assert tiny.weights(run_dir) == ["epoch-0.safetensors", "epoch-1.safetensors"]


def test_a_run_that_ends_within_an_epoch_saves_its_last_step(tmp_path):
    assert tiny.weights(tiny.train(tmp_path, "max_steps=1")) == ["step-1.safetensors"]


def test_a_pass_over_the_data_is_as_many_steps_as_it_takes(tmp_path):
    run_dir = tiny.train(tmp_path, "max_steps=null", "num_epochs=1", "batch_size=3")  # of 8 samples
    assert [line["step"] for line in tiny.metrics(run_dir)] == [1, 2, 3]
    assert tiny.weights(run_dir) == ["epoch-0.safetensors"]


def test_every_logged_step_has_its_numbers(plain):
    lines = tiny.metrics(plain)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line.keys() >= {"loss", "grad_norm", "lr", "samples_per_second"} for line in lines)


def test_a_logged_loss_is_the_mean_since_the_last_one(plain, tmp_path):
    (line,) = tiny.metrics(tiny.train(tmp_path, "logger.every=2"))
    assert line["loss"] == pytest.approx(sum(losses(plain)) / 2, rel=1e-5)


def test_the_run_names_its_artefacts(plain):
    assert json.loads((plain / "finished.json").read_text())["artefacts"] == [
        f"{plain}/weights/epoch-0.safetensors",
        f"{plain}/report.html",
    ]


def test_full_training_saves_a_file_a_model_that_loads_in_place_of_the_released_one(tmp_path):
    run_dir = tiny.train(tmp_path, "lora=none", "task.trainable_models=[dit,text_encoder]", "max_steps=1")
    assert tiny.weights(run_dir) == ["step-1.dit.safetensors", "step-1.text_encoder.safetensors"]
    for name in ("dit", "text_encoder"):
        path, released = run_dir / "weights" / f"step-1.{name}.safetensors", tiny.model() / tiny.COMPONENTS[name]
        (original,) = released.glob("*.safetensors")
        assert load_file(path).keys() == load_file(original).keys()
        trained = load_model(ModelConfig(path=str(path), config=str(released)))
        untrained = load_model(ModelConfig(path=str(released)))
        assert not any(map(torch.equal, *map(first_matrices, (trained, untrained))))


def first_matrices(module: torch.nn.Module) -> list[torch.Tensor]:
    """A weight that a loss reaches in each of the models trained here."""
    return [
        p
        for name, p in module.named_parameters()
        if "blocks.0.attn.to_q.w" in name or "layers.0.self_attn.q_proj.w" in name
    ]


# What does not change it ----------------------------------------------------------------------------------------------


def test_the_same_seed_trains_the_same_weights(plain, tmp_path):
    assert_close(final_weights(tiny.train(tmp_path)), final_weights(plain), **EXACT)


def test_accumulation_changes_nothing(plain, tmp_path):
    accumulated = tiny.train(tmp_path, "micro_batch_size=1")
    assert_close(losses(accumulated), losses(plain), **CLOSE)
    assert_close(final_weights(accumulated), final_weights(plain), **CLOSE)


def test_evaluating_a_run_changes_nothing(plain, tmp_path):
    evaluated = tiny.train(tmp_path, *EVALUATING)
    assert_close(losses(evaluated), losses(plain), **EXACT)
    assert_close(final_weights(evaluated), final_weights(plain), **EXACT)


def test_gradient_checkpointing_changes_nothing(plain, tmp_path):
    assert_close(losses(tiny.train(tmp_path, "memory=checkpointing")), losses(plain), **CLOSE)


def test_images_are_decoded_in_one_epoch_and_remembering_them_changes_nothing(tmp_path, monkeypatch):
    counts, decode = Counter(), LoadImage.__call__

    def noted(self, data):
        counts[data] += 1
        return decode(self, data)

    monkeypatch.setattr(LoadImage, "__call__", noted)
    flipped = ["max_steps=6", "dataset.augmentation.flip=0.5"]
    remembered = tiny.train(tmp_path / "remembered", *flipped)
    once, _ = counts.copy(), counts.clear()
    again = tiny.train(tmp_path / "again", *flipped, "memory.remember=0")
    assert_close(losses(remembered), losses(again), **EXACT)
    assert sum(counts.values()) == 24 and max(once.values()) <= 2  # each image as it is, and mirrored


@pytest.mark.slow  # a worker of its own imports everything; test_resume.py has one by default
def test_workers_change_nothing(plain, tmp_path):
    assert_close(losses(tiny.train(tmp_path, "dataset.num_workers=1")), losses(plain), **EXACT)


def assert_is_the_run_of_one_process(root: Path, plain: Path) -> Path:
    (run_dir,) = root.iterdir()
    assert run_dir.name == plain.name
    assert_close(losses(run_dir), losses(plain), **CLOSE)
    assert_close(final_weights(run_dir), final_weights(plain), **CLOSE)
    return run_dir


def test_two_processes_make_one_run_with_the_losses_of_one(plain, tmp_path):
    assert warm.ranks(2, tiny.run, tiny.train_overrides(tmp_path)) == [0, 0]
    assert_is_the_run_of_one_process(tmp_path, plain)


@pytest.mark.slow
def test_two_processes_of_torchrun_say_everything_once(plain, tmp_path):
    two = ["torchrun", "--standalone", "--nproc_per_node", "2"]
    said = tiny.process(*two, "train.py", *tiny.train_overrides(tmp_path))
    run_dir = assert_is_the_run_of_one_process(tmp_path, plain)
    assert (run_dir / "train.log").read_text().count("Finished.") == said.count("Finished.") == 1


# What is evaluated ----------------------------------------------------------------------------------------------------

EVALUATING = [
    "validation=base",
    "validation.every=1",
    "validation.prompts=[a red emoji,a blue emoji]",
    "validation.options={num_inference_steps: 2, height: 32, width: 32}",
    "validation.loss_samples=2",
    "+validation.metrics.retrieval={_target_: diffsynth.training.validation.metrics.Retrieval}",
    "validation.metric_samples=3",
    "+validation.datasets.held_out={_target_: diffsynth.core.data.UnifiedDataset.from_folder, height: 32, width: 32}",
    f"+validation.datasets.held_out.path={tiny.dataset()}",
]


def test_validation_samples_grids_and_logs_numbers_before_between_and_after(tmp_path):
    run_dir = tiny.train(tmp_path, *EVALUATING)
    lines = [line for line in tiny.metrics(run_dir) if "held_out_loss" in line]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[0]["held_out_loss"] != lines[2]["held_out_loss"]
    assert all(0 <= line["held_out_retrieval"] <= 1 for line in lines)
    pictures = {path.name: Image.open(path).size for path in (run_dir / "samples").iterdir()}
    assert pictures.keys() == {"step-000000.png", "step-000001.png", "step-000002.png", "progress.png"}
    width, height = pictures["step-000000.png"]
    assert pictures["progress.png"] == (width, 3 * height)


# What can be chosen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["prodigy", "schedule_free"])
def test_every_optimizer_takes_its_steps(optimizer, plain, tmp_path):
    run_dir = tiny.train(tmp_path, f"optimizer={optimizer}")
    assert losses(run_dir)[0] == pytest.approx(losses(plain)[0], rel=1e-5)
    assert losses(run_dir)[1] != losses(plain)[1]


@pytest.mark.parametrize(
    "schedule, expected",
    [
        pytest.param("constant", [1, 1, 1, 1], marks=pytest.mark.slow),
        ("constant_with_warmup", [0, 0.5, 1, 1]),
        pytest.param("linear", [0, 0.5, 1, 0.5], marks=pytest.mark.slow),
        ("cosine", [0, 0.5, 1, 0.5]),
        ("warmup_stable_decay", [0, 0.5, 1, 0.5]),
    ],
)
def test_every_schedule_ends_with_the_run_and_logs_the_rate_of_each_step(schedule, expected, tmp_path):
    names = {"constant": [], "warmup_stable_decay": ["num_warmup_steps", "num_decay_steps"]}.get(
        schedule, ["num_warmup_steps"]
    )
    lengths = [f"lr_scheduler.{name}=2" for name in names]
    run_dir = tiny.train(
        tmp_path, f"lr_scheduler={schedule}", *lengths, "max_steps=4", "batch_size=1", "optimizer.lr=1e-4"
    )
    assert [line["lr"] / 1e-4 for line in tiny.metrics(run_dir)] == pytest.approx(expected)


@pytest.mark.parametrize("adapter", tiny.mostly_slow(["rslora", "dora", "loha", "lokr"], "dora", "lokr"))
def test_every_adapter_learns(adapter, tmp_path):
    run_dir = tiny.train(tmp_path, f"lora={adapter}", "lora.rank=2", "max_steps=1")
    assert tiny.metrics(run_dir)[0]["grad_norm"] > 0


# Command lines --------------------------------------------------------------------------------------------------------


def test_the_same_command_again_says_that_the_run_is_finished(plain, monkeypatch, capsys):
    before = tiny.metrics(plain)
    tiny.command_line(monkeypatch, "train.py", *tiny.train_overrides(plain.parent))
    said = capsys.readouterr().out
    assert f"{plain} is finished" in said and "epoch-0.safetensors" in said
    assert tiny.metrics(plain) == before


@pytest.mark.slow  # test_sweep.py has one by default
def test_a_sweep_trains_every_choice_in_its_own_folder(monkeypatch, tmp_path):
    overrides = tiny.merged(tiny.train_overrides(tmp_path), ["lora.rank=2,4", "max_steps=1"])
    tiny.command_line(monkeypatch, "train.py", "-m", *overrides)
    folders = [path.parent for path in tmp_path.glob("*/resolved.yaml")]
    ranks = [load_file(folder / "weights" / "step-1.safetensors") for folder in folders]
    assert sorted(min(next(iter(tensors.values())).shape) for tensors in ranks) == [2, 4]
    assert all("Finished." in (folder / "train.log").read_text() for folder in folders)


def test_accelerate_launches_a_run(tmp_path):
    overrides = tiny.merged(tiny.train_overrides(tmp_path), ["lora.rank=8", "max_steps=1"])
    said = tiny.process("accelerate", "launch", "train.py", *overrides)
    assert re.search(r"Finished\. .*step-1\.safetensors", said, re.DOTALL)


def test_a_saved_configuration_runs_again(plain, tmp_path, monkeypatch):
    again = ["--config-path", str(plain), "--config-name", "config", f"output_root={tmp_path}"]
    tiny.command_line(monkeypatch, "train.py", *again)
    assert compare(plain, tmp_path / plain.name) == [f"config   output_root: {plain.parent} | {tmp_path}"]


def test_a_run_that_reads_no_cache_computes_no_keys(tmp_path, monkeypatch):
    monkeypatch.setattr("diffsynth.cache.keys.CacheKeys.about", None)
    assert tiny.weights(tiny.train(tmp_path))
