"""The images that a released model trains on unless told otherwise: fetched once, or refused in one line."""

from pathlib import Path

import pytest
import tiny
from hub_server import serve
from PIL import Image

from diffsynth.config import build, claim
from diffsynth.core.data import UnifiedDataset, read_example

REPOSITORY, FOLDER = "DiffSynth-Studio/diffsynth_example_dataset", "qwen_image/Qwen-Image"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One hub for all tests, as its client keeps the address that it is first called with."""
    folder = tmp_path_factory.mktemp("hub")
    tiny.write_dataset(folder / FOLDER, count=3)
    tiny.write_dataset(folder / "family/Other", count=1)
    with serve(folder, REPOSITORY) as started:
        yield started


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """A hub with images for two models: the list of files that were fetched from it."""
    endpoint, fetched = server
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", endpoint)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fetched.clear()
    return fetched


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "data" / FOLDER)


def test_the_images_of_a_model_are_fetched_once_and_only_those(hub, path):
    rows = read_example(path, REPOSITORY, FOLDER)
    assert [row["image"] for row in rows] == ["0.png", "1.png", "2.png"]
    assert sorted(hub) == [f"{FOLDER}/{name}" for name in ("0.png", "1.png", "2.png", "metadata.csv")]
    hub.clear()
    assert len(read_example(path, REPOSITORY, FOLDER)) == 3 and hub == []


def test_images_that_are_there_need_no_network(path, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "1")
    tiny.write_dataset(Path(path), count=2)
    assert len(read_example(path, REPOSITORY, FOLDER)) == 2


def test_what_was_fetched_in_part_is_fetched_again(hub, path, monkeypatch):
    def breaks_off(*_, **__):
        raise ConnectionError("the line is dead")

    with monkeypatch.context() as patched, pytest.raises(ValueError, match="the line is dead"):
        patched.setattr("modelscope.dataset_snapshot_download", breaks_off)
        read_example(path, REPOSITORY, FOLDER)
    assert len(read_example(path, REPOSITORY, FOLDER)) == 3


@pytest.mark.parametrize(
    "setting, reason",
    [
        ({"DIFFSYNTH_SKIP_DOWNLOAD": "1"}, "DIFFSYNTH_SKIP_DOWNLOAD is set"),
        ({"MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 does not answer"),
    ],
)
def test_without_a_network_one_line_says_how_to_train_on_ones_own(setting, reason, path, monkeypatch):
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as refused:
        read_example(path, REPOSITORY, FOLDER)
    message = str(refused.value)
    assert reason in message and "dataset=image_folder dataset.path=…" in message and "\n" not in message


def test_a_model_without_examples_is_answered_with_how_to_train_on_ones_own(path):
    with pytest.raises(ValueError, match="no images for this model: .*dataset=image_folder"):
        read_example(path, REPOSITORY, None)


def test_a_folder_that_the_hub_has_not_is_named(hub, tmp_path):
    with pytest.raises(ValueError, match="has no family/Nobody"):
        read_example(str(tmp_path / "data/family/Nobody"), REPOSITORY, "family/Nobody")


def test_a_plan_takes_a_blank_picture_of_the_models_size_and_fetches_nothing(hub, tmp_path):
    folder = f"dataset.path={tmp_path}/data/qwen_image/Qwen-Image"
    dataset = build(tiny.compose("plan", "model=qwen_image", folder))["dataset"]
    assert isinstance(dataset, UnifiedDataset) and hub == []
    assert dataset.scan(required=["image", "prompt"]) == []
    assert dataset[0]["image"].size == (1328, 1328)


def test_a_plan_of_an_editing_model_has_a_blank_picture_to_edit(tmp_path):
    folder = f"dataset.path={tmp_path}/data/qwen_image/Qwen-Image-Edit"
    dataset = build(tiny.compose("plan", "model=qwen_image_edit", folder))["dataset"]
    assert dataset[0]["image"].size == dataset[0]["edit_image"].size == (1024, 1024)


def test_a_plan_of_a_model_of_videos_has_a_blank_video_of_its_size(tmp_path):
    folder = f"dataset.path={tmp_path}/data/wanvideo/Wan2.2-TI2V-5B"
    dataset = build(tiny.compose("plan", "model=wan22_ti2v_5b", folder))["dataset"]
    assert dataset.scan(required=["video", "prompt"]) == []
    frames = dataset[0]["video"]
    assert (len(frames), frames[0].size) == (49, (832, 480))


def test_a_released_model_trains_on_its_examples_and_shows_them(hub, path, tmp_path, caplog):
    caplog.set_level("INFO")
    small = [
        "model.torch_dtype=float32",
        "model.height=32",
        "model.width=32",
        "validation.options.num_inference_steps=1",
    ]
    short = ["device=cpu", "max_steps=1", "batch_size=1", "memory=none", f"output_root={tmp_path}/outputs"]
    cfg = tiny.compose("train", "model=qwen_image", *tiny.model_overrides(), f"dataset.path={path}", *small, *short)
    run_dir = claim(cfg)
    tiny.call("train", cfg)
    assert f"Training data: 3 rows of {REPOSITORY}, {FOLDER}" in caplog.text
    assert "trained_loss" in tiny.metrics(run_dir)[-1]
    assert Image.open(run_dir / "samples/trained_progress.png").width >= 2 * 32
