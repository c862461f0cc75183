"""Training on videos: from a folder and from its cache, which changes nothing, with images beside the clips."""

import json
from functools import cache
from pathlib import Path

import pytest
import tiny
from miniatures import wan
from PIL import Image
from video_files import picture, write_rows, write_video

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
    report = json.loads((plain / "data_report.json").read_text())
    assert report["sizes"] == {"32x32, 1 frame": 4, "32x32, 5 frames": 4}
    assert Image.open(plain / "data_report.png").width > 4 * 32
