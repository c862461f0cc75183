"""How the processes of a run wait for one another, and agree on their folder."""

from datetime import timedelta

import pytest

from diffsynth.training import checks
from diffsynth.training.accelerator import make_accelerator


def test_processes_wait_longer_than_a_checkpoint_of_a_large_model_takes():
    accelerator = make_accelerator("cpu", "float32")
    bytes_of_state, slowest_disk = 20.4e9 * 12, 0.5e9  # fp32 weights and moments; bytes per second
    assert accelerator.init_handler.timeout > 2 * timedelta(seconds=bytes_of_state / slowest_disk)


def test_gradients_are_not_held_twice():
    assert make_accelerator("cpu", "float32").ddp_handler.gradient_as_bucket_view


def test_processes_whose_paths_have_a_clock_are_refused(monkeypatch):
    checks.check_one_folder("outputs/12-00-00")
    monkeypatch.setattr(checks, "gather_object", lambda own: [*own, "outputs/12-00-01"])
    with pytest.raises(
        ValueError, match="run_dir differs between processes: outputs/12-00-00, outputs/12-00-01; expected one"
    ):
        checks.check_one_folder("outputs/12-00-00")
