"""Networks whose tokens lie on several devices predict, and learn, what they do whole."""

import json

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from diffsynth.core.context_parallel import Devices

CASES = ["alone", "padded", "checkpointed", "kv_cache", "further text"]


class Three(Devices):
    def __init__(self):
        self.rank, self.count = 0, 3


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """How far predictions and gradients in two processes are from those in one, by family and case."""
    path = tmp_path_factory.mktemp("apart") / "result.json"
    found = f"{tiny.ROOT}:{tiny.ROOT / 'tests'}"
    tiny.process(
        "torchrun", "--standalone", "--nproc_per_node", "2", "tests/context_worker.py", str(path), PYTHONPATH=found
    )
    return json.loads(path.read_text())


@pytest.mark.parametrize("family", ["qwen", "flux2"])
@pytest.mark.parametrize("case", CASES)
def test_predictions_and_gradients_are_those_of_a_whole_network(apart, family, case):
    assert apart[f"{family}, {case}"] < 1e-5


@given(count=st.integers(0, 10_000))
def test_every_token_is_on_one_device_and_devices_differ_by_one_token_at_most(count):
    shares = Three().shares(count)
    assert sum(shares) == count and max(shares) - min(shares) <= 1
