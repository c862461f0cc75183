"""Videos that cannot be used: each is named with its row before training, and what would do."""

import re
import struct
import wave
from pathlib import Path

import av
import pytest
from miniatures.videos import numbers, picture, turn, write_animation, write_rows, write_video
from PIL import Image

from diffsynth.core.data import SampleAddress, VideoDataset
from diffsynth.core.data.videos import container

FIXED = {"height": 48, "width": 64, "num_frames": 5}


def scanned(folder: Path, *rows: dict, **options) -> VideoDataset:
    found = VideoDataset.from_folder(str(write_rows(folder, *rows)), **FIXED | options)
    found.scan(["video"])
    return found


def short(folder: Path) -> str:
    return write_video(folder / "short.mp4", 30, 16).name


def cut_off(folder: Path, suffix: str, **options) -> str:
    path = write_video(folder / f"a{suffix}", **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path.name


def faststart(folder: Path) -> str:
    """An MP4 whose header comes first, and whose frames are cut off."""
    with av.open(str(folder / "a.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=16)
        (stream.width, stream.height), stream.pix_fmt = (64, 48), "yuv420p"
        for index in range(30):
            container.mux(stream.encode(av.VideoFrame.from_image(picture(index))))
        container.mux(stream.encode(None))
    content = (folder / "a.mp4").read_bytes()
    (folder / "a.mp4").write_bytes(content[:-100])
    return "a.mp4"


def sound(folder: Path) -> str:
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000)
        file.writeframes(struct.pack("<800h", *range(800)))
    (folder / "a.wav").rename(folder / "a.mp4")
    return "a.mp4"


def page(folder: Path) -> str:
    (folder / "a.mp4").write_text("<html>Not found</html>")
    return "a.mp4"


def no_frames(folder: Path) -> str:
    (folder / "empty").mkdir(exist_ok=True)
    return "empty"


UNUSABLE = {
    "too few frames": (short, {"num_frames": 81}, "has 30 frames, expected 81; take a longer video, or add a smaller"),
    "at a rate": (short, {"num_frames": 81, "frame_rate": 8}, "has 15 frames at 8 per second, expected 81"),
    "cut off, header last": (
        lambda folder: cut_off(folder, ".mp4"),
        {},
        "has no complete header: it is cut off; copy or",
    ),
    "cut off, header first": (faststart, {}, r"is cut off: it has \d+ bytes of \d+; copy or download it again"),
    "sound": (sound, {}, "holds no video that FFmpeg can read, but audio; leave it out"),
    "a page": (page, {}, "is not a video that FFmpeg can read; it begins with b'<html>"),
    "an empty folder": (no_frames, {}, "has no frames; expected files of images"),
    "absent": (lambda folder: "b.mp4", {}, "not found"),
    "outside": (lambda folder: "../b.mp4", {}, "leads out of"),
}


@pytest.mark.parametrize(("write", "options", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_video_is_named_before_training(tmp_path, write, options, message):
    good = write_video(tmp_path / "good.mp4", 170).name
    with pytest.raises(ValueError, match=f"row 2: video '{re.escape(write(tmp_path))}': {message}"):
        scanned(tmp_path, {"video": good}, {"video": write(tmp_path)}, **options)
    rows = scanned(tmp_path, {"video": good}, {"video": write(tmp_path)}, **options, on_error="skip")
    assert [row.row for row in rows.skipped] == [2]
    assert rows.size == 1


def test_a_row_without_the_column_is_named(tmp_path):
    write_video(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="row 2: has no video, but prompt, image"):
        scanned(tmp_path, {"video": "a.mp4"}, {"image": "b.png"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 80}, r"num_frames=80: the model takes 4n \+ 1 frames; set dataset.num_frames=77 or 81"),
        ({"num_frames": [1, 6]}, "num_frames=6: .* set dataset.num_frames=5 or 9"),
        ({"num_frames": 81, "time_division_factor": 32}, "num_frames=81: .* set dataset.num_frames=65 or 97"),
        ({"num_frames": []}, "num_frames is empty; set one number"),
        ({"height": 40}, "height=40 is not a multiple of height_division_factor=16: set dataset.height to 48 or 32"),
        ({"height": None}, "height=None and width=64: set both"),
        ({"data_file_keys": ["image"]}, "choose a model of videos, or dataset=image_folder"),
    ],
)
def test_wrong_options_are_refused_with_those_that_fit(tmp_path, options, message):
    write_rows(tmp_path, {"video": "a.mp4"})
    with pytest.raises(ValueError, match=message):
        VideoDataset.from_folder(str(tmp_path), **FIXED | options)


def test_buckets_need_every_row_and_one_shape_does_not(tmp_path):
    rows = [{"video": write_video(tmp_path / f"{number}.mp4").name} for number in range(3)]
    with pytest.raises(ValueError, match="several sizes or dataset.num_frames need .* set dataset.scan_rows=3"):
        scanned(tmp_path, *rows, num_frames=[1, 5], scan_rows=2)
    assert scanned(tmp_path, *rows, scan_rows=2).size == 3


def test_a_video_whose_frames_end_early_is_named_while_training(tmp_path):
    write_video(tmp_path / "a.mkv", 40)
    rows = scanned(tmp_path, {"video": "a.mkv"}, num_frames=37)
    content = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ValueError, match=r"row 1: video 'a.mkv': has \d+ frames, expected 37"):
        rows.sample(SampleAddress(0, 0), 0)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_video_of_a_turned_phone_is_upright(tmp_path, degrees):
    ramp = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    turn(write_video(tmp_path / "a.mp4", pictures=[ramp] * 5), degrees)
    rows = scanned(tmp_path, {"video": "a.mp4"}, height=None, width=None, max_pixels=64 * 48)
    upright = (64, 48) if degrees == 180 else (48, 64)
    assert rows.original_size(0)[:2] == upright
    assert {frame.size for frame in rows[0]["video"]} == {upright}
    assert list(rows.rows_in_buckets()) == [(*upright, 5)]


def test_videos_of_a_row_have_one_size_and_length(tmp_path):
    for name, count, size in (("a", 30, (64, 48)), ("b", 20, (64, 48)), ("c", 30, (32, 32))):
        write_video(tmp_path / f"{name}.mp4", count, size=size)
    options = {"data_file_keys": ["video", "control_video", "vace_video_mask"], "num_frames": 25}
    with pytest.raises(ValueError, match="row 1: control_video has 20 frames and video 30; cut both to one length"):
        scanned(tmp_path, {"video": "a.mp4", "control_video": "b.mp4"}, **options | {"num_frames": [17, 25]})
    with pytest.raises(ValueError, match="row 1: vace_video_mask is 32 x 32 pixels and video 64 x 48; save both at"):
        scanned(tmp_path, {"video": "a.mp4", "vace_video_mask": "c.mp4"}, **options)
    scanned(tmp_path, {"video": "a.mp4", "control_video": "b.mp4"}, **options | {"num_frames": 17})
    with pytest.raises(ValueError, match="control_video has 20 frames and video 30; .*set dataset.start=first"):
        scanned(
            tmp_path, {"video": "a.mp4", "control_video": "b.mp4"}, **options | {"num_frames": 17, "start": "middle"}
        )


def test_a_mask_that_is_white_all_over_is_told(tmp_path, caplog):
    write_video(tmp_path / "a.mp4")
    white = [Image.new("RGB", (64, 48), "white")] * 30
    write_video(tmp_path / "b.mp4", pictures=white)
    rows = scanned(tmp_path, {"video": "a.mp4", "video_mask": "b.mp4"}, data_file_keys=["video", "video_mask"])
    for _ in range(2):
        rows[0]
    assert [record.message for record in caplog.records if "white" in record.message] == [
        "video_mask 'b.mp4' is white in all frames of a clip, so that all of it is to be generated; if black is meant, "
        "invert the masks."
    ]


# Long and hostile files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_only_the_wanted_frames_of_a_long_video_are_decoded(tmp_path, suffix, monkeypatch):
    write_video(tmp_path / f"a{suffix}", 1200)
    decoded = []
    own = container.Container._frames_before

    def counted(self, time):
        for frame in own(self, time):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(container.Container, "_frames_before", counted)
    rows = scanned(tmp_path, {"video": f"a{suffix}"}, start="middle")
    assert len(decoded) == 1  # for its size
    decoded.clear()
    assert numbers(rows[0]["video"]) == [number % 64 for number in range(598, 603)]
    assert len(decoded) < 30  # a key frame every 12


def test_a_playlist_is_not_followed(tmp_path):
    write_video(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path}/a.mp4\n#EXT-X-ENDLIST\n")
    with pytest.raises(ValueError, match="row 1: video 'b.mp4'"):
        scanned(tmp_path, {"video": "b.mp4"})


def test_random_starts_are_refused_by_a_cache(tmp_path):
    write_video(tmp_path / "a.mp4")
    with pytest.raises(
        ValueError, match="start=random takes other frames each time.*set dataset.start=first or middle"
    ):
        scanned(tmp_path, {"video": "a.mp4"}, start="random").variants(0)
    write_animation(tmp_path / "b.gif")
    for start in ("first", "middle"):
        clip = scanned(tmp_path, {"video": "b.gif"}, start=start).variants(0).rows[""]["video"]
        assert clip.size == (64, 48, 5)
        assert numbers(clip.load()) == numbers(scanned(tmp_path, {"video": "b.gif"}, start=start)[0]["video"])
