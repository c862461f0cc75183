"""A finished run goes on to more steps, and comes out as one that was that long from the start; or it says why not."""

import json
from functools import partial
from pathlib import Path

import pytest
import tiny
from resumed import EXACT, artefacts, final_weights, kept, metrics
from torch.testing import assert_close
from transformers import get_cosine_schedule_with_warmup

from diffsynth.config import ConfigError, claim, finish
from diffsynth.training.checkpoint import Checkpoints, read_checkpoint
from diffsynth.training.schedule import same_until, warn_of_warmup

KEEP = ["checkpoint.every=1", "checkpoint.keep_last=9"]
WARMUP = ["lr_scheduler=constant_with_warmup", "lr_scheduler.num_warmup_steps=2"]
DECAY = ["lr_scheduler=warmup_stable_decay", "lr_scheduler.num_warmup_steps=1", "lr_scheduler.num_decay_steps=2"]


def checkpoint(run_dir: Path, step: int) -> dict:
    return read_checkpoint(Checkpoints(run_dir / "checkpoints").path / f"step-{step:06d}")


@pytest.mark.parametrize(
    "how",
    [
        ["lr_scheduler=constant", "lora.dropout=0.3", "ema=power"],
        pytest.param(WARMUP, marks=pytest.mark.slow),
        [*DECAY, *KEEP],  # goes on from before its decay
    ],
)
def test_a_finished_run_that_is_extended_is_one_that_was_longer_from_the_start(how, tmp_path):
    finished = tiny.train(tmp_path / "a", "max_steps=4", *how)
    extended = tiny.train(tmp_path / "a", "max_steps=6", *how)
    longer = tiny.train(tmp_path / "b", "max_steps=6", *how)
    assert finished == extended and extended.name == longer.name
    assert_close(final_weights(extended), final_weights(longer), **EXACT)
    assert checkpoint(extended, 6) == checkpoint(longer, 6)
    assert metrics(extended) == metrics(longer)
    assert [line["step"] for line in metrics(extended)] == [1, 2, 3, 4, 5, 6]
    assert artefacts(extended) == artefacts(longer)


def test_a_run_of_passes_is_extended_by_more_of_them(tmp_path):
    short = tiny.train(tmp_path, "max_steps=null", "num_epochs=1")
    assert tiny.train(tmp_path, "max_steps=null", "num_epochs=2") == short
    assert [line["step"] for line in metrics(short)] == [1, 2, 3, 4]  # eight pictures, four a step


def test_an_extension_that_is_cut_off_goes_on_and_the_shorter_run_stays_finished(tmp_path, caplog):
    caplog.set_level("INFO")
    run_dir = tiny.train(tmp_path, "max_steps=2", "checkpoint.every=1")
    tiny.cut_off(3, tmp_path, "max_steps=4", "checkpoint.every=1")
    assert json.loads((run_dir / "finished.json").read_text())["length"] == {"max_steps": 2}
    assert tiny.train(tmp_path, "max_steps=4", "checkpoint.every=1") == run_dir
    assert "Resuming from step 3" in caplog.text and kept(run_dir) == [3, 4]


def test_a_run_whose_rate_has_fallen_in_all_checkpoints_cannot_be_extended(tmp_path):
    run_dir = tiny.train(tmp_path, "max_steps=4", *DECAY)  # keeps a checkpoint of step 4 only
    with pytest.raises(ValueError, match=r"cannot be extended to 6 steps.*\(step 4\)") as refused:
        tiny.train(tmp_path, "max_steps=6", *DECAY)
    message = str(refused.value)
    assert f"{run_dir}/weights" in message and "name=…" in message
    assert "max_steps: 4" in (run_dir / "config.yaml").read_text()  # a refusal leaves the run's record as it was
    for key_of_what_is_trained in ("lora.checkpoint=…", "model.dit.path=…", "TEMPLATE_MODEL_PATH"):
        assert key_of_what_is_trained in message
    assert "\n" not in message
    assert json.loads((run_dir / "finished.json").read_text())["length"] == {"max_steps": 4}


def test_a_finished_run_is_not_made_shorter(tmp_path):
    run_dir = tiny.train(tmp_path, "max_steps=3")
    with pytest.raises(ConfigError, match=rf"{run_dir} is finished at step 3; set name=… for a run of max_steps=2"):
        tiny.train(tmp_path, "max_steps=2")


def test_a_stopped_run_is_not_made_shorter_than_it_is(tmp_path):
    tiny.cut_off(3, tmp_path, "max_steps=5", "checkpoint.every=1")
    with pytest.raises(ValueError, match=r"has a checkpoint of step 3, but this run has only 2 steps: set max_steps"):
        tiny.train(tmp_path, "max_steps=2", "checkpoint.every=1")


def test_a_run_whose_rate_depends_on_its_length_starts_anew_and_says_why(tmp_path, caplog):
    caplog.set_level("WARNING")
    short = tiny.train(tmp_path, "max_steps=2", "lr_scheduler=cosine")
    long = tiny.train(tmp_path, "max_steps=3", "lr_scheduler=cosine")
    assert short != long
    assert f"This run starts from step 0: {short} holds the same run with another length" in caplog.text
    advice = f"To start from its weights in {short}/weights, set lora.checkpoint=…"
    assert advice in caplog.text
    with pytest.raises(
        ConfigError, match=r"cannot be extended, because every step of transformers\.get_cosine"
    ) as error:
        tiny.train(tmp_path, "max_steps=4", "lr_scheduler=cosine", f"run_dir={short}")
    assert advice in str(error.value)


@pytest.fixture
def as_of_old():
    """Rewrites the record of a finished run as it was until 2026-11-30."""

    def rewrite(run_dir: Path) -> Path:
        record = json.loads((run_dir / "finished.json").read_text())
        (run_dir / "finished.json").write_text(json.dumps({"artefacts": record["artefacts"]}))
        return run_dir

    return rewrite


def finished(output_root: Path, *overrides: str) -> Path:
    """The folder of a run that is finished without having been trained."""
    cfg = tiny.compose("train", *tiny.merged(tiny.train_overrides(output_root), overrides))
    run_dir = claim(cfg)
    finish(cfg, [])
    return run_dir


def test_a_run_that_an_older_version_finished_is_finished_and_may_stand_beside_a_new_one(tmp_path, as_of_old, caplog):
    caplog.set_level("INFO")
    old = as_of_old(finished(tmp_path, "lr_scheduler=cosine"))
    same, longer = (
        tiny.merged(tiny.train_overrides(tmp_path), ["lr_scheduler=cosine", n]) for n in ("seed=0", "max_steps=9")
    )
    assert claim(tiny.compose("train", *same)) is None
    assert claim(tiny.compose("train", *longer)) not in (None, old)
    assert f"{old} holds the same run with another length" in caplog.text


def test_a_run_that_an_older_version_finished_keeps_its_length_while_it_is_extended(tmp_path, as_of_old):
    old = as_of_old(finished(tmp_path))
    shorter, longer = (
        tiny.compose("train", *tiny.merged(tiny.train_overrides(tmp_path), [f"max_steps={n}"])) for n in (2, 4)
    )
    assert claim(longer) == old and claim(longer) == old  # stopped, and begun again
    assert claim(shorter) is None


def test_rates_are_compared_up_to_the_step_that_is_taken_next():
    def step(number: int, steps: int) -> float:
        return 1.0 if number < steps - 2 else 0.5

    def schedule(optimizer, num_training_steps):
        from torch.optim.lr_scheduler import LambdaLR

        return LambdaLR(optimizer, lambda number: step(number, num_training_steps))

    assert same_until(None, 9, 10, 20)
    assert same_until(schedule, 7, 10, 20)
    assert not same_until(schedule, 8, 10, 20)


def test_a_warm_up_as_long_as_the_run_is_a_warning(caplog):
    cosine = partial(get_cosine_schedule_with_warmup, num_warmup_steps=50)
    warn_of_warmup(cosine, None, 51)
    assert caplog.text == ""
    warn_of_warmup(cosine, None, 50)
    assert "lr_scheduler.num_warmup_steps=50, but the run has 50 steps" in caplog.text
    assert "set lr_scheduler.num_warmup_steps=5." in caplog.text
