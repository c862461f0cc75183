"""One recorded curve per task: a change that is to change no number changes none of these.

`python tests/golden/runs.py check` compares all of them, and weights and latents, to the last bit.
"""

import json

import pytest
from golden import runs

RECORDED = json.loads(runs.RECORD.read_text(encoding="utf-8"))
# Relative. ATEN_CPU_CAPABILITY=default and avx2 change losses by at most 1.4e-6 (torch 2.13, 2026-11-30); that other
# releases of torch change them by less than this is a guess.
TOLERANCE = 1e-3
# The distillations' own runs are tested elsewhere; these are one of each entry and kind of data.
DEFAULT = ["default", "template", "direct"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("golden")
    runs.write_data(path / "data")
    return path


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in DEFAULT else pytest.mark.slow)
        for n in runs.RUNS
        if n not in ("cache", "cached")
    ],
)
def test_a_task_has_the_losses_that_were_recorded(name, folder):
    found, expected = runs.run(name, folder)["losses"], RECORDED[name]["losses"]
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for now, before in zip(found, expected, strict=True):
        assert now == pytest.approx(before, rel=TOLERANCE)


def test_a_cached_training_has_the_losses_that_were_recorded(folder):
    runs.run("cache", folder)
    found = runs.run("cached", folder)["losses"]
    assert [line["loss"] for line in found] == pytest.approx(
        [line["loss"] for line in RECORDED["cached"]["losses"]], rel=TOLERANCE
    )
