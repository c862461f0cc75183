"""Data sets of videos: the frames of clips, their sizes, and what is said of files that cannot be used."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from diffsynth.core.data import SampleAddress, VideoDataset

SIZE = (64, 48)


def picture(number: int, size=SIZE) -> Image.Image:
    """Frame `number`, whose upper half is of a grey for number % 8, and its lower half of one for number // 8."""
    rows = np.repeat([number % 8, number // 8], size[1] // 2)
    return Image.fromarray(np.repeat(30 * rows[:, None] + 20, size[0], axis=1).astype(np.uint8)).convert("RGB")


def number(frame: Image.Image) -> int:
    upper, lower = np.split(np.asarray(frame.convert("L"), dtype=float), 2)
    return round((upper.mean() - 20) / 30) + 8 * round((lower.mean() - 20) / 30)


def numbers(frames) -> list[int]:
    return [number(frame) for frame in frames]


def write_video(path: Path, count=30, rate=16, size=SIZE, times=None, codec=None, **options) -> Path:
    """A video of `picture`s, at `times` counted in 1/rate seconds."""
    codec = codec or {".webm": "libvpx-vp9", ".avi": "mpeg4"}.get(path.suffix, "libx264")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"g": "12", **options})
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        for index, time in enumerate(times or range(count)):
            frame = av.VideoFrame.from_image(picture(index, size))
            frame.pts, frame.time_base = time, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_rows(folder: Path, *rows: dict) -> Path:
    import json

    lines = [json.dumps({"prompt": "a film", **row}) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def dataset(folder: Path, **options) -> VideoDataset:
    found = VideoDataset.from_folder(str(folder), **{"height": 48, "width": 64, "num_frames": 5, **options})
    found.scan(["video"])
    return found


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mov", ".mkv", ".avi"])
@pytest.mark.parametrize(("start", "first"), [("first", 0), ("middle", 13)])
def test_a_clip_has_the_frames_from_its_start_on(tmp_path, suffix, start, first):
    write_video(tmp_path / f"a{suffix}")
    rows = dataset(write_rows(tmp_path, {"video": f"a{suffix}"}), start=start)
    assert numbers(rows[0]["video"]) == list(range(first, first + 5))
    assert [frame.size for frame in rows[0]["video"]] == [SIZE] * 5
    assert list(rows.rows_in_buckets()) == [(64, 48, 5)]


def test_a_random_start_is_a_function_of_seed_epoch_and_sample(tmp_path):
    write_video(tmp_path / "a.mp4")
    rows = dataset(write_rows(tmp_path, {"video": "a.mp4"}), start="random")
    first = [numbers(rows.sample(SampleAddress(epoch, 0), 0)[0]["video"]) for epoch in range(8)]
    again = [numbers(rows.sample(SampleAddress(epoch, 0), 0)[0]["video"]) for epoch in range(8)]
    assert first == again
    assert len({clip[0] for clip in first}) > 2
    assert all(clip == list(range(clip[0], clip[0] + 5)) for clip in first)
