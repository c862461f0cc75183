"""Data sets of videos: which frames of which files a clip has."""

import tarfile
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from miniatures.videos import SIZE, numbers, picture, write_animation, write_frames, write_rows, write_video
from PIL import Image

from diffsynth.core.data import (
    Augmentation,
    ImageCropAndResize,
    LoadVideo,
    MixedDataset,
    SampleAddress,
    VideoDataset,
    read_shards,
)
from diffsynth.core.data.videos import container, stored
from diffsynth.core.data.videos.durations import durations

FIXED = {"height": 48, "width": 64, "num_frames": 5}


def dataset(folder: Path, **options) -> VideoDataset:
    found = VideoDataset.from_folder(str(folder), **FIXED | options)
    found.scan(["video"])
    return found


# Open groups of pictures begin with frames that are shown before their key frame; VP8 has frames that are never shown.
ENCODINGS = {
    ".mp4": {"x264-params": "open-gop=1:bframes=5"},
    ".webm": {"codec": "libvpx", "auto-alt-ref": "1", "lag-in-frames": "16"},
    **dict.fromkeys([".mov", ".mkv", ".ts", ".flv", ".avi", ".h264"], {}),
    ".mpg": {"codec": "mpeg2video"},
}


@pytest.mark.parametrize("suffix", ENCODINGS)
@pytest.mark.parametrize(("start", "first"), [("first", 0), ("middle", 31)])
def test_a_clip_has_the_frames_from_its_start_on(tmp_path, suffix, start, first):
    rate = 25 if suffix == ".mpg" else 16
    write_video(tmp_path / f"a{suffix}", 66, rate, **ENCODINGS[suffix])
    rows = dataset(write_rows(tmp_path, {"video": f"a{suffix}"}), start=start)
    assert numbers(rows[0]["video"]) == list(range(first, first + 5))
    assert [frame.size for frame in rows[0]["video"]] == [SIZE] * 5
    assert list(rows.rows_in_buckets()) == [(64, 48, 5)]


def test_a_frame_that_the_decoder_leaves_out_is_the_one_before(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4")
    rows = dataset(write_rows(tmp_path, {"video": "a.mp4"}))
    own = container.Container._decoded_from

    def without_two(self, time):
        return (found for number, found in enumerate(own(self, time)) if number not in (0, 3))

    monkeypatch.setattr(container.Container, "_decoded_from", without_two)
    assert numbers(rows[0]["video"]) == [1, 1, 2, 2, 4]  # nothing is before the first


@pytest.mark.parametrize("start", ["first", "middle"])
def test_a_file_that_is_larger_than_ffmpegs_buffer_is_read_to_its_end(tmp_path, start):
    noise = np.random.default_rng(0).integers(0, 256, (16, 48, 64, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.mp4", pictures=[Image.fromarray(frame) for frame in noise], qp="0", bf="0")
    assert path.stat().st_size > 1 << 16
    assert len(dataset(write_rows(tmp_path, {"video": "a.mp4"}), num_frames=13, start=start)[0]["video"]) == 13


def frame_names(folder: Path) -> list[str]:
    write_frames(folder / "frames")
    return [f"frames/{index}.png" for index in range(8)]


KINDS = {
    "gif": lambda folder: write_animation(folder / "a.gif").name,
    "webp": lambda folder: write_animation(folder / "a.webp").name,
    "apng": lambda folder: write_animation(folder / "a.png").name,
    "avif": lambda folder: write_animation(folder / "a.avif").name,
    "folder": lambda folder: write_frames(folder / "film", 12).name,
    "list": frame_names,
}


@pytest.mark.parametrize("write", KINDS.values(), ids=KINDS)
def test_animations_and_files_of_frames_are_videos(tmp_path, write):
    rows = dataset(write_rows(tmp_path, {"video": write(tmp_path)}))
    assert numbers(rows[0]["video"]) == [0, 1, 2, 3, 4]


def test_frames_of_a_folder_are_sorted_by_number(tmp_path):
    write_frames(tmp_path / "film", 12, "shot1-{}.png")  # 10 comes after 9
    rows = dataset(write_rows(tmp_path, {"video": "film"}), num_frames=9, start="middle")
    assert numbers(rows[0]["video"]) == list(range(2, 11))


def test_a_still_image_is_one_frame(tmp_path):
    picture(7).save(tmp_path / "a.jpg")
    write_video(tmp_path / "b.mp4")
    rows = dataset(write_rows(tmp_path, {"video": "a.jpg"}, {"video": "b.mp4"}), num_frames=[1, 5])
    assert [len(rows[number]["video"]) for number in (0, 1)] == [1, 5]
    assert {size: list(*(each.rows for each in rows)) for size, rows in rows.rows_in_buckets().items()} == {
        (64, 48, 1): [0],
        (64, 48, 5): [1],
    }


def test_a_folder_without_a_table_has_the_captions_beside_its_videos(tmp_path):
    write_video(tmp_path / "a.mp4", 5)
    (tmp_path / "a.txt").write_text("a film")
    row = dataset(tmp_path)[0]
    assert (row["prompt"], numbers(row["video"])) == ("a film", [0, 1, 2, 3, 4])


def test_videos_are_read_from_tar_shards(tmp_path):
    files = {"0.mp4": write_video(tmp_path / "a.mp4").read_bytes(), "0.txt": b"a film"}
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, BytesIO(content))
    rows = dataset(tmp_path, metadata=partial(read_shards, column="video"), start="middle")
    assert numbers(rows[0]["video"]) == [13, 14, 15, 16, 17]


@pytest.mark.parametrize("path", ["a.mp4", None])
@pytest.mark.parametrize("write", [lambda f: write_video(f / "a.mp4"), lambda f: write_animation(f / "a.gif")])
def test_videos_are_read_from_the_cells_of_a_table(tmp_path, write, path):
    cell = {"bytes": write(tmp_path).read_bytes(), "path": path and f"x{Path(path).suffix}"}
    if path and write(tmp_path).suffix != ".mp4":
        cell["path"] = "x.gif"
    pq.write_table(pa.table({"video": [cell], "prompt": ["a film"]}), tmp_path / "metadata.parquet")
    assert numbers(dataset(tmp_path)[0]["video"]) == [0, 1, 2, 3, 4]


def test_only_the_first_of_many_files_of_frames_is_opened_to_count_them(tmp_path, monkeypatch):
    picture(0).save(tmp_path / "0.png")
    opened = []
    monkeypatch.setattr(stored, "open_image", lambda file, own=stored.open_image: opened.append(file) or own(file))
    names = ["0.png"] * 100_000
    rows = dataset(write_rows(tmp_path, {"video": names}))
    assert opened == [str(tmp_path / "0.png")]
    assert len(rows[0]["video"]) == 5


# Resampling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv"])
@pytest.mark.parametrize(
    ("rate", "count", "shown"),
    [(8, 15, [0, 2, 4, 6, 8]), (32, 60, [0, 0, 1, 1, 2]), (16, 30, [0, 1, 2, 3, 4]), (12, 23, [0, 1, 2, 4, 5])],
)
def test_frames_are_those_on_the_screen_at_the_frame_rate(tmp_path, suffix, rate, count, shown):
    write_video(tmp_path / f"a{suffix}", 30, 16)
    rows = dataset(write_rows(tmp_path, {"video": f"a{suffix}"}), frame_rate=rate)
    assert numbers(rows[0]["video"]) == shown
    assert rows.original_size(0) == (64, 48, count)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_frames_of_variable_length_are_resampled_by_their_times(tmp_path, suffix):
    times = [0, 1, 2, 6, 7, 8, 9, 20, 21, 22, 23, 24]  # frame 2 is shown for 4 / 10 s, frame 6 for 11 / 10 s
    write_video(tmp_path / f"a{suffix}", rate=10, times=times, count=12)
    rows = dataset(write_rows(tmp_path, {"video": f"a{suffix}"}), frame_rate=10, num_frames=25)
    expected = [0, 1, 2, 2, 2, 2, 3, 4, 5, *[6] * 11, 7, 8, 9, 10, 11]
    assert numbers(rows[0]["video"]) == expected


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_durations_of_an_animation_are_read_without_decoding_it(tmp_path, name):
    given = [40, 80, 120, 2000, 10]
    odd = {"icc_profile": b"abc"} if name == "a.webp" else {}  # a chunk of an odd number of bytes
    write_animation(tmp_path / name, 5, given, **odd)
    with Image.open(tmp_path / name) as image, (tmp_path / name).open("rb") as file:
        assert durations(file, image.format) == given


def test_a_frame_of_a_gif_without_a_duration_has_none():
    image = b"\x2c" + bytes(9) + b"\x02\x01\x00\x00"
    control = b"\x21\xf9\x04\x00\x05\x00\x00\x00"
    assert durations(BytesIO(b"GIF89a" + bytes(7) + control + image + image + b"\x3b"), "GIF") == [50, 0]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.avif"])
def test_animations_are_resampled_by_their_times(tmp_path, name):
    write_animation(tmp_path / name, 4, [40, 80, 120, 40])
    rows = dataset(write_rows(tmp_path, {"video": name}), frame_rate=25)
    assert numbers(rows[0]["video"]) == [0, 1, 1, 2, 2]
    assert rows.original_size(0) == (64, 48, 7)


# Choices --------------------------------------------------------------------------------------------------------------


def test_a_random_start_is_a_function_of_seed_epoch_and_sample(tmp_path):
    write_video(tmp_path / "a.mp4")
    rows = dataset(write_rows(tmp_path, {"video": "a.mp4"}), start="random")
    first = [numbers(rows.sample(SampleAddress(epoch, 0), 0)[0]["video"]) for epoch in range(8)]
    again = [numbers(rows.sample(SampleAddress(epoch, 0), 0)[0]["video"]) for epoch in range(8)]
    assert first == again
    assert len({clip[0] for clip in first}) > 2
    assert all(clip == list(range(clip[0], clip[0] + 5)) for clip in first)


def test_all_videos_of_a_row_give_the_same_frames_cropped_and_mirrored_alike(tmp_path):
    ramp = [
        Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 2 + index, (48, 1))).convert("RGB")
        for index in range(30)
    ]
    for name in ("a.mkv", "b.mkv"):
        write_video(tmp_path / name, pictures=ramp, qp="0")
    ramp[0].save(tmp_path / "c.png")
    row = {"video": "a.mkv", "control_video": "b.mkv", "reference_image": "c.png"}
    options = {"data_file_keys": list(row), "start": "random", "height": 32, "width": 32}
    options["augmentation"] = Augmentation(flip=0.5, random_crop=True)
    rows = dataset(write_rows(tmp_path, row), **options)
    samples = [rows.sample(SampleAddress(epoch, 0), 0)[0] for epoch in range(6)]
    for sample in samples:
        pairs = zip(sample["video"], sample["control_video"], strict=True)
        assert all(np.array_equal(one, other) for one, other in pairs)
        assert isinstance(sample["reference_image"], Image.Image)
    slopes = {
        int(np.sign(int(s["video"][0].getpixel((31, 0))[0]) - s["video"][0].getpixel((0, 0))[0])) for s in samples
    }
    assert slopes == {1, -1}


def test_four_processes_decode_ahead_on_a_gpu(tmp_path):
    write_video(tmp_path / "a.mp4")
    rows = dataset(write_rows(tmp_path, {"video": "a.mp4"}))
    mixed = MixedDataset({"films": rows})
    for own in (rows, mixed):
        own.num_workers = None
        assert [own.workers_on(torch.device(kind)) for kind in ("cuda", "cpu")] == [4, 0]
        own.num_workers = 3
        assert own.workers_on(torch.device("cuda")) == 3


# For a cache ----------------------------------------------------------------------------------------------------------


def test_a_clip_that_is_not_read_yet_has_a_key_of_its_file_and_frames(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, rate=16 if name == "a.mp4" else 25)
    write_frames(tmp_path / "film", 12)
    folder = write_rows(tmp_path, *({"video": name} for name in ("a.mp4", "b.mp4", "film")))
    flipped = {"augmentation": Augmentation(flip=0.5)}
    options = [{}, {"start": "middle"}, {"frame_rate": 8}, {"num_frames": 9}, {"height": 32}]
    keys = {dataset(folder, **own).variants(0).rows[""]["video"].identity for own in options}
    keys |= {dataset(folder, **flipped).variants(0).rows["mirrored"]["video"].identity}
    keys |= {dataset(folder).variants(number).rows[""]["video"].identity for number in (1, 2)}
    assert len(keys) == 8
    before = dataset(folder).variants(2).rows[""]["video"].identity
    picture(63).save(tmp_path / "film" / "11.png")  # is not in the clip
    assert dataset(folder).variants(2).rows[""]["video"].identity == before
    picture(63).save(tmp_path / "film" / "4.png")
    assert dataset(folder).variants(2).rows[""]["video"].identity != before


def test_a_clip_equals_the_frames_that_an_operator_loads(tmp_path):
    write_video(tmp_path / "a.mp4", bf="3")
    one = LoadVideo(num_frames=5, frame_processor=ImageCropAndResize(32, 48))(str(tmp_path / "a.mp4"))
    other = dataset(write_rows(tmp_path, {"video": "a.mp4"}), height=32, width=48)[0]["video"]
    assert [frame.tobytes() for frame in one] == [frame.tobytes() for frame in other]
