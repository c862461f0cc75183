"""Training on videos: from a folder and from its cache, which changes nothing, with images beside the clips."""

import os
import signal
from functools import cache
from pathlib import Path

import pytest
import tiny
import warm
from families import FAMILIES
from miniatures import wan
from miniatures.videos import picture, write_rows, write_video
from PIL import Image
from resumed import STEPS, assert_same_run

from diffsynth.core.data import VideoDataset
from diffsynth.pipelines.wan import WanPipeline
from diffsynth.training.record.data_report import DataReport

CLIPS = ["dataset.height=32", "dataset.width=32", "dataset.num_frames=[1,5]", "dataset.start=middle"]


@cache
def films() -> Path:
    """A folder of four videos and four images; written once per session."""
    folder = tiny.kept_folder() / "films"
    folder.mkdir()
    for number in range(4):
        write_video(folder / f"{number}.mp4", pictures=[picture(7 * number + index) for index in range(9)])
        picture(number).save(folder / f"{number}.png")
    names = [f"{number}.{suffix}" for suffix in ("mp4", "png") for number in range(4)]
    return write_rows(folder, *({"video": name, "prompt": f"film {name}"} for name in names))


def overrides(*others: str) -> list[str]:
    parts = [f"model.{name}.path={wan.text_to_video() / part}" for name, part in tiny.COMPONENTS.items()]
    model = ["model=tiny_wan", *parts, f"hydra.searchpath=[file://{Path(__file__).parents[1]}/conf]"]
    data = ["dataset=video_folder", f"dataset.path={films()}", "dataset.metadata=metadata.jsonl", *CLIPS]
    return [*model, *data, *others]


def losses(run_dir: Path) -> list[float]:
    return [entry["loss"] for entry in tiny.metrics(run_dir) if "loss" in entry]


def test_a_run_on_videos_and_images_equals_one_on_their_cache(tmp_path):
    plain = tiny.train(tmp_path / "plain", *overrides("data_report.rows=8", "data_report.pictures=8"))
    cached = tmp_path / "cache"
    tiny.make_cache(cached, *overrides())
    own = [line for line in overrides() if not line.startswith("dataset")]
    two_stage = tiny.train(
        tmp_path / "two", *own, "dataset=cache", f"dataset.path={cached}", "dataset.height=null", "dataset.width=null"
    )
    assert losses(plain) == pytest.approx(losses(two_stage), rel=1e-5)


def train_and_kill_the_second(overrides: list[str]) -> None:
    """Train in one of two ranks, the second of which is killed in the third step."""
    with tiny.in_step(3, lambda: os.environ["RANK"] == "1" and os.kill(os.getpid(), signal.SIGKILL)):
        tiny.run(overrides)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_two_processes_that_are_killed_on_a_cache_of_videos_end_as_those_that_were_not(tmp_path):
    tiny.make_cache(tmp_path / "cache", *overrides())
    own = [line for line in overrides() if not line.startswith("dataset")]
    data = ["dataset=cache", f"dataset.path={tmp_path}/cache", "dataset.height=null", "dataset.width=null"]
    whole, killed = (
        tiny.merged(tiny.train_overrides(tmp_path / name), [*own, *data, *STEPS]) for name in ("whole", "killed")
    )
    assert warm.ranks(2, tiny.run, whole) == [0, 0]
    assert 0 not in warm.ranks(2, train_and_kill_the_second, killed)
    assert warm.ranks(2, tiny.run, killed) == [0, 0]
    assert_same_run(*(next((tmp_path / name).iterdir()) for name in ("killed", "whole")))


def test_a_run_takes_first_frames_from_its_videos_and_shows_a_row_with_its_own(tmp_path):
    (family,) = (family for family in FAMILIES if family.name == "wan22_ti2v_5b")
    data = [line for line in overrides() if line.startswith("dataset")]
    shown = ["validation=trained", 'validation.prompts=["a red apple"]', "validation.options.num_inference_steps=2"]
    run = tiny.train(tmp_path / "run", *family.overrides, *data, "task.extra_inputs=[input_image]", *shown)
    assert len(losses(run)) > 0 and (run / "samples" / "trained_progress.png").exists()


def rows_of(folder: Path, num_frames) -> VideoDataset:
    rows = VideoDataset.from_folder(str(folder), height=32, width=32, num_frames=num_frames, start="middle")
    rows.scan(["video"])
    return rows


def test_the_data_report_counts_buckets_and_shows_film_strips(tmp_path):
    (tmp_path / "other.mp4").write_bytes((films() / "2.mp4").read_bytes())
    validation = {"held_out": rows_of(write_rows(tmp_path, {"video": "other.mp4", "prompt": "a"}), 5)}
    rows = rows_of(films(), [1, 5])
    report = DataReport(tmp_path).write(WanPipeline(), rows, rows.order(4, 0), validation, 0)
    assert report["sizes"] == {"32x32, 1 frame": 4, "32x32, 5 frames": 4}
    assert report["also_in_validation"] == {"held_out": [[2, 0]]}
    assert report["enlarged"] == []
    with Image.open(tmp_path / "data_report.png") as sheet:
        assert sheet.width == 4 * 5 * 32 + 4 * 128  # strips of five frames, and images, which are enlarged
