"""Configurations that runs of an older layout saved: today's code still runs them, and computes what they did."""

import json
from pathlib import Path

import hydra
import pytest
import tiny
from hydra.core.global_hydra import GlobalHydra

from diffsynth.config import check, signature
from diffsynth.config.moved import MOVED, up_to_date, with_current_names

GOLDEN = tiny.ROOT / "tests" / "golden"
SAVED = sorted((GOLDEN / "saved").glob("*.yaml"))


@pytest.fixture
def folder(tmp_path):
    """`folder(name)`: a run's folder with the configuration that it saved."""

    def of(name: str) -> Path:
        text = (GOLDEN / "saved" / f"{name}.yaml").read_text(encoding="utf-8")
        (tmp_path / "config.yaml").write_text(text.replace("FOLDER", str(tmp_path)), encoding="utf-8")
        return tmp_path

    return of


@pytest.mark.parametrize("name", [path.stem for path in SAVED])
def test_a_saved_configuration_is_one_of_todays(name, folder):
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(folder(name)), version_base="1.3"):
        cfg = hydra.compose("config")
    check(cfg, tiny.schema("distill" if "prompts" in cfg else "train"))
    assert signature(cfg) == signature(up_to_date(cfg))
    assert "receipt" not in up_to_date(cfg) and up_to_date(up_to_date(cfg)) == up_to_date(cfg)


@pytest.mark.parametrize("template, rows", [({"path": "mine"}, 3), (None, 1)])
def test_the_number_of_rows_for_templates_is_the_one_number_of_rows(template, rows):
    validation = {"row_samples": 1, "template_samples": 3}
    current = with_current_names({"template": template, "validation": validation})["validation"]
    assert current == {"row_samples": rows} and validation["template_samples"] == 3


def test_a_configuration_of_today_is_left_as_it_is():
    cfg = tiny.compose("train")
    assert up_to_date(cfg) is cfg


@pytest.mark.parametrize("new", MOVED.values())
def test_what_moved_is_where_it_is_said_to_be(new):
    from importlib import import_module

    module, _, name = new.rpartition(".")
    assert hasattr(import_module(module), name) or import_module(new)


def test_a_saved_run_replays_to_the_losses_that_it_had(folder, monkeypatch):
    run_dir = folder("default")
    tiny.command_line(monkeypatch, "train.py", "--config-path", str(run_dir), "--config-name", "config")
    (replayed,) = run_dir.glob("default/golden-*")
    recorded = json.loads((GOLDEN / "record.json").read_text())["default"]["losses"]
    assert [line["loss"] for line in tiny.metrics(replayed)] == pytest.approx([r["loss"] for r in recorded], rel=1e-3)


def test_a_run_of_today_replays_by_the_configuration_that_it_saved(tmp_path, monkeypatch):
    run_dir = tiny.train(tmp_path / "first")
    again = ["--config-path", str(run_dir), "--config-name", "config", f"output_root={tmp_path}/second"]
    tiny.command_line(monkeypatch, "train.py", *again)
    replayed = tmp_path / "second" / run_dir.name
    assert [line["loss"] for line in tiny.metrics(replayed)] == [line["loss"] for line in tiny.metrics(run_dir)]
