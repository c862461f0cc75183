"""What a run and generate.py show of videos: film strips, animations, files that play, in the report as well."""

import base64
import json

import pytest
import tiny
from families import FAMILIES
from PIL import Image
from test_family_contract import run

from diffsynth.core.data.operators.video_files import pyav
from diffsynth.diffusion.pipeline.video_media import VideoMedia, evenly_spaced
from diffsynth.report import pictures

FAMILY = next(family for family in FAMILIES if family.name == "wan21_t2v_1_3b")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    evaluated = ["validation=base", "validation.prompts=[a red emoji,a cat]", "max_steps=1"]
    return tiny.run(run(FAMILY, tmp_path_factory.mktemp("run"), *evaluated, "validation.options.num_inference_steps=1"))


def test_a_validation_shows_film_strips_and_an_animation_of_all_clips(run_dir):
    for step in (0, 1):
        strips, animation = (run_dir / "samples" / f"step-{step:06d}{suffix}" for suffix in (".png", ".webp"))
        with Image.open(animation) as shown:
            assert shown.n_frames == FAMILY.num_frames and shown.width == 2 * 128
        with Image.open(strips) as shown:
            assert shown.width == 2 * 5 * 32


def test_the_report_plays_the_animations(run_dir):
    shown = pictures(run_dir)
    files = [run_dir / "samples" / f"step-{picture['step']:06d}.webp" for picture in shown]
    assert [base64.b64decode(picture["source"].partition(",")[2]) for picture in shown] == [
        f.read_bytes() for f in files
    ]
    assert len(files) == 2


def generated(folder, *overrides: str):
    given = [
        f"output={folder}",
        "prompt=[a cat]",
        "options.num_inference_steps=1",
        "options.cfg_scale=1",
        "device=cpu",
        "overwrite=true",
    ]
    return tiny.call("generate", tiny.compose("generate", *FAMILY.overrides, *given, *overrides))


def test_generate_writes_videos_that_play_at_the_frame_rate_that_is_asked_for(tmp_path):
    (file,) = generated(tmp_path / "out", "num_frames=9", "frame_rate=5")
    with pyav().open(str(file)) as container:
        parameters, stream = json.loads(container.metadata["comment"]), container.streams.video[0]
        assert (stream.frames, stream.average_rate, stream.width, stream.height) == (9, 5, 32, 32)
    assert parameters["prompt"] == "a cat" and parameters["num_frames"] == 9 and parameters["seed"] == 0


def test_generate_starts_from_a_video_of_at_least_as_many_frames(tmp_path):
    start, other = (generated(tmp_path / f"{seed}", f"seed={seed}")[0] for seed in (0, 1))
    strength = "denoising_strength=0.05"
    results = [
        generated(tmp_path / file.parent.name / "from", strength, f"+options.input_video={file}")[0].read_bytes()
        for file in (start, start, other)
    ]
    assert results[0] == results[1] != results[2]
    with pytest.raises(ValueError, match="input_video has 5 frames, expected at least num_frames=9"):
        generated(tmp_path / "more", strength, f"+options.input_video={start}", "num_frames=9")


def test_models_of_images_have_no_frames(tmp_path):
    with pytest.raises(ValueError, match="QwenImagePipeline has no argument 'num_frames'"):
        tiny.call("generate", tiny.compose("generate", f"output={tmp_path}/out", "num_frames=9", "device=cpu"))


def test_a_film_strip_goes_from_the_first_frame_to_the_last():
    frames = [Image.new("RGB", (2, 2), (number, 0, 0)) for number in range(81)]
    strip = VideoMedia().thumbnail(frames)
    assert [strip.getpixel((2 * number, 0))[0] for number in range(5)] == [0, 20, 40, 60, 80]
    assert evenly_spaced(1, 5) == [0] and evenly_spaced(3, 5) == [0, 1, 2]
