"""Metrics and images in the trackers, read back by the services' own libraries."""

import json
import struct
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from PIL import Image

from diffsynth.training.record import trackers
from diffsynth.training.record.numbers import LocalLogger

EVALUATING = [
    "validation=base",
    "validation.prompts=[a rocket]",
    "validation.options.num_inference_steps=2",
    "validation.options.height=32",
    "validation.options.width=32",
]


def expected(run_dir: Path) -> dict[str, list]:
    """{name: [(step, value), …]} of metrics.jsonl."""
    series = defaultdict(list)
    for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()):
        for name, value in line.items():
            series[name].append((line["step"], value))
    del series["step"]
    return series


def test_tensorboard_files_hold_every_number_once_and_the_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tiny.train(tmp_path, "logger=tensorboard", "logger.every=1", *EVALUATING)
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    for name, points in expected(run_dir).items():
        assert [(s.step, s.value) for s in events.Scalars(name)] == [(n, pytest.approx(v)) for n, v in points]
    assert [image.step for image in events.Images("samples")] == [0, 2]


def test_a_picture_is_read_only_for_a_tracker_and_the_run_goes_on_if_it_cannot_be(tmp_path, caplog):
    Image.effect_noise((64, 64), 64).save(path := tmp_path / "cut_off.png")
    path.write_bytes(path.read_bytes()[:2000])
    LocalLogger(tmp_path).log(1, {}, {"samples": path})
    assert not caplog.records
    trackers = {"it": SimpleNamespace(picture=lambda *_: None)}
    LocalLogger(tmp_path, trackers=trackers).log(1, {}, {"samples": path})
    assert "Step 1 of logger.trackers.it is not written" in caplog.text


def wandb_history(file: Path) -> dict[str, list]:
    """{name: [(step, value), …]} of a W&B transaction log: LevelDB's log format, W&B's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, series, message, position = file.read_bytes(), defaultdict(list), b"", 7
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # a header does not fit into what is left of the block
            position += 32768 - position % 32768
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record.FromString(message)
            values = {(item.key or ".".join(item.nested_key)): item.value_json for item in record.history.item}
            for name in values.keys() - {"_step"}:
                series[name].append((record.history.step.num, json.loads(values[name])))
            message = b""
    return series


def test_an_offline_wandb_run_holds_every_number_once_and_the_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_dir = tiny.train(tmp_path, "logger=wandb", "logger.trackers.wandb.mode=offline", "logger.every=1", *EVALUATING)
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    history = wandb_history(file)
    for name, points in expected(run_dir).items():
        assert history[name] == [(n, pytest.approx(v)) for n, v in points]
    assert [step for step, _ in history["samples.filenames"]] == [0, 2]


def test_several_loggers_at_once(tmp_path):
    cfg = tiny.compose("train", "logger=[tensorboard,wandb,swanlab,trackio]")
    assert set(cfg.logger.trackers) == {"tensorboard", "wandb", "swanlab", "trackio"}


def test_a_service_that_is_not_installed_is_answered_with_the_extra(monkeypatch):
    def missing(self, step, config):
        raise ModuleNotFoundError("No module named 'swanlab'")

    monkeypatch.setattr(trackers.SwanLab, "open", missing)
    with pytest.raises(ValueError, match=r'SwanLab needs swanlab: pip install "diffsynth-hydra\[loggers\]"'):
        trackers.SwanLab("p", "n", "i", "path").start(0, {})


def test_a_trackio_run_holds_every_number_once(tmp_path, monkeypatch):
    storage = pytest.importorskip("trackio.sqlite_storage")
    for module in [module for name, module in sys.modules.items() if name.startswith("trackio")]:
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    run_dir = tiny.train(tmp_path, "logger=trackio", "logger.every=1", *EVALUATING)
    logs = storage.SQLiteStorage.get_logs("diffsynth", run_dir.name)
    for name, points in expected(run_dir).items():
        assert [(log["step"], log[name]) for log in logs if name in log] == points


def test_a_swanlab_run_stays_here_when_it_is_told_to(tmp_path):
    pytest.importorskip("swanlab")
    run_dir = tiny.train(
        tmp_path, "logger=swanlab", "logger.trackers.swanlab.mode=local", "logger.every=1", *EVALUATING
    )
    assert any(path.is_file() for path in (run_dir / "swanlab").rglob("*"))
