"""debug=…: runs that find out what is wrong, or slow, before a long one begins."""

import gzip
import json

import pytest
import tiny
from resumed import kept

from diffsynth.core.data import UnifiedDataset, WeightedRows
from diffsynth.core.data.order.mixing import first_samples
from diffsynth.training.profile import Profile

FEW = ["validation.options.num_inference_steps=1", "export.save_steps=null"]


def train(folder, debug: str, *overrides: str):
    """A run of the tiny model with what a debug file says in the place of what the tests otherwise leave out."""
    says = ("name=", "max_steps=", "batch_size=", "validation=", "lr_scheduler=", "logger.", "export.", "data_report.")
    own = [override for override in tiny.train_overrides(folder) if not override.startswith(says)]
    return tiny.run([*own, f"debug={debug}", *overrides])


def test_overfit_trains_on_one_sample_and_evaluates_on_it(tmp_path, monkeypatch):
    seen, sample = set(), UnifiedDataset.sample

    def noted(dataset, address, *others):
        seen.add(address.index)
        return sample(dataset, address, *others)

    monkeypatch.setattr(UnifiedDataset, "sample", noted)
    run_dir = train(tmp_path, "overfit", "max_steps=30", "batch_size=2", *FEW)
    losses = [line["trained_loss"] for line in tiny.metrics(run_dir) if "trained_loss" in line]
    assert json.loads((run_dir / "data_report.json").read_text())["trained_on"] == 1
    assert seen == {0} and len(losses) == 3 and losses[0] > losses[1] > losses[2]
    assert (run_dir / "samples" / "trained_progress.png").exists()


def test_two_steps_come_through_every_stage_and_can_be_taken_up_again(tmp_path):
    run_dir = train(tmp_path, "two_steps")
    assert kept(run_dir) == [1, 2] and tiny.weights(run_dir) == ["step-1.safetensors", "step-2.safetensors"]
    assert [line["step"] for line in tiny.metrics(run_dir) if "trained_loss" in line] == [0, 1, 2]
    assert len(list((run_dir / "samples").glob("trained_step-*.png"))) == 3
    assert (run_dir / "report.html").exists() and (run_dir / "data_report.png").exists()


def test_a_profile_is_a_chrome_trace_of_a_few_steps(tmp_path):
    run_dir = train(tmp_path, "profile", "batch_size=2", *FEW[1:])
    with gzip.open(run_dir / "profile" / "rank-0.json.gz", "rt") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert {name for name in names if name.startswith("ProfilerStep#")} == {f"ProfilerStep#{n}" for n in (3, 4, 5)}
    assert any(name.startswith("aten::") for name in names)


def test_a_run_that_is_too_short_for_its_trace_says_so(tmp_path, caplog):
    with Profile(tmp_path, after=3, steps=3) as profile:
        profile.step()
    assert "No trace is written: the run ended before step 6." in caplog.text and not list(tmp_path.iterdir())


@pytest.mark.parametrize("overrides", [["profile.steps=0"], ["profile.after=0"]])
def test_a_profile_of_nothing_is_refused(overrides, tmp_path):
    with pytest.raises(ValueError, match=r"profile.\w+ is 0 \(int\); expected a whole number of at least 1"):
        train(tmp_path, "profile", *overrides)


def test_the_first_samples_of_buckets_are_those_of_the_smallest_indices():
    buckets = [
        [WeightedRows(range(2, 5), 3)],
        [WeightedRows([0, 7]), WeightedRows(range(8, 9))],
        [WeightedRows([1, 6])],
    ]
    kept = [[(list(part.rows), part.weight) for part in parts] for parts in first_samples(buckets, 3)]
    assert kept == [[([2], 3)], [([0], 1)], [([1], 1)]]
    assert [[list(part.rows) for part in parts] for parts in first_samples(buckets, 1)] == [[[0]]]
