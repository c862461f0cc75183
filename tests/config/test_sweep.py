"""Sweeps: what they leave beside their runs, that one bad job ends none of the others, and the page that compares."""

import json
import re
from pathlib import Path

import pytest
import tiny
from omegaconf import OmegaConf

from diffsynth.config.sweep import sweep_folder
from diffsynth.report.sweep import read_runs, write_sweep

EVALUATING = [
    "validation=base",
    "validation.prompts=[a red emoji,a blue emoji]",
    "validation.options={num_inference_steps: 1, height: 32, width: 32}",
    "validation.loss_samples=2",
    "+validation.datasets.held_out={_target_: diffsynth.core.data.UnifiedDataset.from_folder, height: 32, width: 32}",
    f"+validation.datasets.held_out.path={tiny.dataset()}",
]


def overrides(folder, *others: str) -> list[str]:
    return tiny.merged(tiny.train_overrides(folder), others)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two learning rates of one step, and a third that is refused: the sweep's folder."""
    folder = tmp_path_factory.mktemp("sweep")
    secret = "export.trigger_prompts=['${oc.env:MYSEC}','https://me:hunter2@h/x']"
    given = overrides(folder, "optimizer.lr=-1,1e-3,1e-2", "max_steps=1", "batch_size=2", secret, *EVALUATING)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="error: optimizer.lr is -1"):
        patch.setenv("MYSEC", "hunter2")
        tiny.command_line(patch, "train.py", "-m", *given)
    (found,) = folder.glob("tiny-sweep-*")
    return found


def test_a_job_that_fails_does_not_end_the_sweep(sweep):
    rows = json.loads((sweep / "sweep.json").read_text())
    assert [row["state"].split(":")[0] for row in rows] == ["failed", "finished", "finished"]
    assert "optimizer.lr is -1" in rows[0]["state"]


def test_the_page_shows_only_what_differs_and_marks_the_best(sweep):
    page = (sweep / "sweep.html").read_text(encoding="utf-8")
    head, *lines = re.findall("<tr>(.*?)</tr>", page.partition("</table>")[0])
    assert re.findall("<th>(.*?)&emsp;", head)[2] == "optimizer.lr"
    assert "max_steps" not in head and "batch_size" not in head
    rows = json.loads((sweep / "sweep.json").read_text())
    lowest = min(row["held_out_loss"] for row in rows if row["held_out_loss"] is not None)
    assert ["★" in line for line in lines] == [row["held_out_loss"] == lowest for row in rows]
    assert all(row["memory_gb"] > 0 and row["minutes"] >= 0 for row in rows[1:])


def test_the_page_shows_what_each_run_sampled(sweep):
    page = (sweep / "sweep.html").read_text(encoding="utf-8")
    assert re.findall(r'alt="(tiny-\w{8}) after 1 steps"', page) == [run.name for run in read_runs(sweep)][1:]


def test_any_folder_of_runs_is_compared(sweep):
    rows = json.loads(write_sweep(sweep.parent).with_name("sweep.json").read_text())
    assert len(rows) == 2 and any(row["best"] for row in rows)


def test_no_file_of_a_sweep_holds_a_secret(sweep):
    paths = [path for path in sweep.parent.rglob("*") if path.is_file()]
    paths = [path for path in paths if path.name != "environment.json"]  # changes of this repository, maybe these lines
    texts = {path.relative_to(sweep.parent).as_posix(): path.read_bytes() for path in paths}
    holds = {name for name, text in texts.items() if b"https://***@h/x" in text and b"${oc.env:MYSEC}" in text}
    assert holds >= {"multirun.yaml", *(f"{sweep.name}/{name}" for name in ("0.json", "1.json", "sweep.json"))}
    assert any(name.endswith(".safetensors") for name in holds)
    assert [name for name, text in texts.items() if b"hunter2" in text] == []


def test_a_new_token_is_no_new_sweep(tmp_path):
    def folder(token: str) -> Path:
        overrides = {"task": [f"dataset.path=https://me:{token}@h/x", "model.path=${oc.env:NOT_SET}"]}
        hydra = {"overrides": overrides, "sweep": {"dir": str(tmp_path)}}
        return sweep_folder(OmegaConf.create({"name": "a", "hydra": hydra}))

    assert folder("one") == folder("two")


def test_a_run_that_is_cut_off_says_how_far_it_is(tmp_path):
    tiny.cut_off(1, tmp_path, "max_steps=2")
    (row,) = json.loads(write_sweep(tmp_path).with_name("sweep.json").read_text())
    assert row["state"] == "not finished: 1 steps"


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="contains no runs; expected the folder of a sweep"):
        write_sweep(tmp_path)
