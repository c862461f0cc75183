import json
import pickle
import shutil
import sys
import wave
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
from miniatures.videos import turn
from PIL import Image

from diffsynth.core.data import ImageCropAndResize, LoadGIF, LoadVideo, UnifiedDataset
from diffsynth.core.data.operators import video
from diffsynth.core.data.sources.storage import EmbeddedFile

ANY_NUMBER = {"time_division_factor": 1, "time_division_remainder": 0}


def picture(number: int, size=(32, 16)) -> Image.Image:
    """The `number`-th frame, of a grey that tells which it is."""
    return Image.new("RGB", size, (20 * number + 10,) * 3)


def numbers(images: list[Image.Image]) -> list[int]:
    return [round((image.convert("L").getpixel((0, 0)) - 10) / 20) for image in images]


def write_video(path, count=10, codec="ffv1", pixels="bgr0", rate=24, times=None, frames=None, **options) -> str:
    """Frames of `picture`, or those given, shown at `times` counted in 1/rate seconds."""
    frames = frames or [picture(number) for number in range(count)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        (stream.width, stream.height), stream.pix_fmt = frames[0].size, pixels
        for time, image in zip(times or range(len(frames)), frames, strict=True):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = time, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def write_animation(path, count=4, duration=(40, 80, 120, 40), **options) -> str:
    first, *others = [picture(number) for number in range(count)]
    first.save(path, save_all=True, append_images=others, duration=list(duration), **options)
    return str(path)


# --- Videos ----------------------------------------------------------------------------------------------------------


def test_frames_are_those_that_were_written(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (5, 16, 32, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.mkv", frames=[Image.fromarray(pixels) for pixels in noise])
    images = LoadVideo()(path)
    assert {image.mode for image in images} == {"RGB"}
    assert np.array_equal(np.stack(images), noise)


@pytest.mark.parametrize(
    ("count", "num_frames", "taken"), [(10, 81, 9), (9, 81, 9), (3, 81, 1), (10, 5, 5), (10, 8, 5), (10, 1, 1)]
)
def test_the_number_of_frames_is_4n_plus_1(tmp_path, count, num_frames, taken):
    path = write_video(tmp_path / "a.mkv", count)
    assert numbers(LoadVideo(num_frames)(path)) == list(range(taken))


def test_other_autoencoders_divide_time_otherwise(tmp_path):
    path = write_video(tmp_path / "a.mkv")
    lengths = [len(LoadVideo(81, factor, remainder)(path)) for factor, remainder in [(8, 1), (8, 0), (1, 0), (4, 3)]]
    assert lengths == [9, 8, 10, 7]
    with pytest.raises(ValueError, match="10 frames are too few: .* by 16 .* leave 0, so use 16 or more"):
        LoadVideo(81, 16, 0)(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "0 frames are too few: .* by 4 .* leave 1, so use 1 or more"),
        ({"num_frames": 3, "time_division_remainder": 0}, "so use 4 or more"),
        ({"frame_rate": 0}, "frame_rate=0, expected frames per second"),
    ],
)
def test_impossible_length_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoadVideo(**options)


# Matroska rounds times to milliseconds, H.264 stores frames in another order than it shows them, in AVI without times.
H264 = {"codec": "libx264", "pixels": "yuv420p", "x264-params": "bframes=3:b-adapt=0"}
FILES = {
    "mkv": ("a.mkv", {}),
    "mp4": ("a.mp4", H264),
    "avi": ("a.avi", H264),
    "ts": ("a.ts", {"codec": "mpeg2video", "pixels": "yuv420p"}),
    "raw": ("a.h264", H264),
}


@pytest.mark.parametrize(("name", "options"), FILES.values(), ids=FILES)
def test_frames_are_resampled_to_a_rate(tmp_path, name, options):
    path = write_video(tmp_path / name, **options)
    assert numbers(LoadVideo()(path)) == list(range(9))
    rates = {rate: numbers(LoadVideo(frame_rate=rate, **ANY_NUMBER)(path)) for rate in (24, 12, 16, 48)}
    assert rates == {
        24: list(range(10)),
        12: [0, 2, 4, 6, 8],
        16: [0, 1, 3, 4, 6, 7, 9],
        48: [number // 2 for number in range(20)],
    }
    assert numbers(LoadVideo(num_frames=6, frame_rate=12)(path)) == [0, 2, 4, 6, 8]


def test_a_rate_counts_seconds_rather_than_frames(tmp_path):
    """Frame 1 stays on the screen for seven ticks, as in the recording of a screen."""
    path = write_video(tmp_path / "a.mkv", 4, times=[0, 1, 8, 9])
    assert numbers(LoadVideo(frame_rate=12, **ANY_NUMBER)(path)) == [0, 1, 1, 1, 2]
    assert numbers(LoadVideo(**ANY_NUMBER)(path)) == [0, 1, 2, 3]


def test_video_is_upright(tmp_path):
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 16, 16))
    lossless = {"codec": "libx264rgb", "pixels": "rgb24", "qp": "0"}
    path = tmp_path / "a.mp4"
    for degrees in (0, 90, 180, 270):
        write_video(path, frames=[image], **lossless)
        turn(path, degrees)
        (frame,) = LoadVideo()(str(path))
        assert np.array_equal(np.asarray(frame), np.asarray(image.rotate(degrees, expand=True)))


def test_each_frame_is_processed(tmp_path):
    path = write_video(tmp_path / "a.mkv", 5)
    operator = LoadVideo(frame_processor=ImageCropAndResize(height=64, width=48))
    assert [image.size for image in operator(path)] == [(48, 64)] * 5
    assert numbers(operator(path)) == list(range(5))
    assert operator.check(path) == [(48, 64)]
    with pytest.raises(ValueError, match="image 32x16 is smaller than one patch"):
        LoadVideo(frame_processor=ImageCropAndResize(width_division_factor=64)).check(path)


def test_check_reads_no_more_than_the_header(tmp_path):
    path = tmp_path / "a.mkv"
    noise = np.random.default_rng(0).integers(0, 256, (5, 16, 32, 3), dtype=np.uint8)
    write_video(path, frames=[Image.fromarray(pixels) for pixels in noise])
    path.write_bytes(path.read_bytes()[:1500])
    assert LoadVideo().check(str(path)) == [(32, 16)]
    assert LoadVideo().check("https://example.invalid/a.mp4") is None
    with pytest.raises(ValueError):
        LoadVideo()(str(path))


@pytest.mark.parametrize(
    ("load", "write", "extension"), [(LoadVideo, write_video, "mkv"), (LoadGIF, write_animation, "gif")]
)
def test_a_cache_knows_frames_by_bytes_and_by_what_is_done_to_them(load, write, extension, tmp_path):
    first, second, moved = (tmp_path / f"{name}.{extension}" for name in ("first", "second", "moved"))
    path, cropped = write(first), load(frame_processor=ImageCropAndResize(height=16, width=16))
    unread = pickle.loads(pickle.dumps(cropped.unread(path)))
    assert unread.size == (16, 16) and numbers(unread.load()) == numbers(cropped(path))
    others = [load(), load(frame_processor=cropped.frame_processor, num_frames=1), load(frame_rate=12)]
    identities = [unread.identity, *(other.unread(path).identity for other in others)]
    write(second, 6, **({"duration": [40] * 6} if load is LoadGIF else {}))
    assert len({*identities, cropped.unread(str(second)).identity}) == 5
    shutil.copy(path, moved)
    assert cropped.unread(str(moved)).identity == unread.identity


def test_video_is_fetched_from_a_url(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mkv", 5)
    monkeypatch.setattr(video, "read_url", lambda url: BytesIO(Path(path).read_bytes()))
    assert numbers(LoadVideo()("https://example.org/a.mkv")) == list(range(5))


def test_video_may_be_a_cell_of_a_table(tmp_path):
    write_video(tmp_path / "a.mkv", 5)
    cell = EmbeddedFile(pa.array([(tmp_path / "a.mkv").read_bytes()]), "a.mkv")
    operator = UnifiedDataset.default_video_operator(height=16, width=16)
    assert operator.check(cell) == [(16, 16)]
    assert numbers(operator(cell)) == list(range(5))


def sound(path):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16_000))


def playlist(path):
    """A list of other files to read, which FFmpeg takes for a video."""
    write_video(path.with_name("secret.mkv"))
    path.write_text("ffconcat version 1.0\nfile secret.mkv\n")


REFUSED = {
    "absent": (lambda path: None, "not found (looked in {folder} for a.mp4)"),
    "empty": (Path.touch, "is not a video that FFmpeg can read; it is empty"),
    "text": (lambda path: path.write_text("no video"), "FFmpeg can read; it begins with b'no video'"),
    "folder": (Path.mkdir, "a.mp4 is a folder; expected a file"),
    "sound": (sound, "holds no video that FFmpeg can read"),
    "playlist": (playlist, "is not a video that FFmpeg can read; it begins with b'ffconcat version 1.0'"),
}


@pytest.mark.parametrize(("write", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_video_is_refused(tmp_path, write, reason):
    write(tmp_path / "a.mp4")
    for use in (LoadVideo().check, LoadVideo()):
        with pytest.raises((ValueError, OSError)) as error:
            use(str(tmp_path / "a.mp4"))
        assert reason.format(folder=tmp_path) in str(error.value)


def test_missing_decoder_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r'Videos need PyAV: pip install "diffsynth-hydra\[data\]"'):
        LoadVideo()
    LoadGIF()


# --- Animations ------------------------------------------------------------------------------------------------------

ANIMATIONS = {"gif": {}, "png": {}, "webp": {"lossless": True}}


@pytest.mark.parametrize(("extension", "options"), ANIMATIONS.items())
def test_animation_is_its_frames(tmp_path, extension, options):
    path = write_animation(tmp_path / f"a.{extension}", **options)
    assert LoadGIF().check(path) == [(32, 16)]
    assert numbers(LoadGIF()(path)) == [0]
    assert numbers(LoadGIF(**ANY_NUMBER)(path)) == [0, 1, 2, 3]
    assert numbers(LoadGIF(frame_rate=25, **ANY_NUMBER)(path)) == [0, 1, 1, 2, 2, 2, 3]
    crop = ImageCropAndResize(height=32, width=32)
    assert LoadGIF(frame_processor=crop)(path)[0].size == (32, 32)


def test_animation_without_times_is_shown_as_browsers_do(tmp_path):
    path = write_animation(tmp_path / "a.gif", duration=[0] * 4)
    assert numbers(LoadGIF(frame_rate=20, **ANY_NUMBER)(path)) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_still_image_is_one_frame_at_any_rate(tmp_path):
    picture(3).save(tmp_path / "a.png")
    assert numbers(LoadGIF(frame_rate=60)(str(tmp_path / "a.png"))) == [3]


def test_transparent_animation_is_shown_on_white(tmp_path):
    frames = [Image.new("RGBA", (32, 16), (0, 0, 0, alpha)) for alpha in (0, 51, 255)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    images = LoadGIF(**ANY_NUMBER)(str(tmp_path / "a.png"))
    assert [image.getpixel((0, 0)) for image in images] == [(255,) * 3, (204,) * 3, (0,) * 3]


# --- Dataset ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    write_video(tmp_path / "a.MP4", 10, codec="mpeg4", pixels="yuv420p")
    write_animation(tmp_path / "b.gif")
    write_animation(tmp_path / "c.webp")
    picture(0).save(tmp_path / "d.jpg")
    picture(0).save(tmp_path / "e.bmp")
    rows = [{"video": name, "prompt": "p"} for name in ("a.MP4", "b.gif", "c.webp", "d.jpg", "e.bmp")]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


def test_dataset_of_videos_loads_whatever_moves_and_stills(folder):
    operator = UnifiedDataset.default_video_operator(folder, height=16, width=16, num_frames=5)
    operator = pickle.loads(pickle.dumps(operator))
    dataset = UnifiedDataset(folder, data_file_keys="video", main_data_operator=operator, on_error="skip")
    (skipped,) = dataset.scan()
    assert str(skipped).startswith("row 5: video 'e.bmp': has the extension 'bmp', expected one of jpg, jpeg, gif,")
    assert [[image.size for image in row["video"]] for row in dataset] == [[(16, 16)] * n for n in (5, 1, 1, 1)]
