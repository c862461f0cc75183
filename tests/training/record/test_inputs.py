"""The files that a run read: a run resumes, and counts as finished, only while their content is the same."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from diffsynth.config import ConfigError, claim
from diffsynth.core.data import UnifiedDataset
from diffsynth.core.input_files import describe, digest_of_all, first_difference
from diffsynth.training import checkpoint
from diffsynth.training.checkpoint import INDEX, read_checkpoint

MORE = ["max_steps=3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a model, a data set, an adapter, and a finished run of two steps that read them."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(tiny.model(), folder / "model")
    shutil.copytree(tiny.dataset(), folder / "data")
    first = tiny.train(folder / "first", "max_steps=1")
    shutil.copy(first / "weights" / tiny.weights(first)[-1], folder / "start.safetensors")
    tiny.train(*arguments(folder))
    return folder


def arguments(folder: Path) -> list:
    start = f"lora.checkpoint={folder / 'start.safetensors'}"
    return [folder / "runs", *tiny.model_overrides(folder / "model"), f"dataset.path={folder / 'data'}", start]


def composed(folder: Path, *more: str):
    root, *overrides = arguments(folder)
    return tiny.compose("train", *tiny.merged(tiny.train_overrides(root), [*overrides, *more]))


def retrained(file: Path) -> None:
    """Other weights in a file of the same names, shapes and size."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:start] + content[start:][::-1])


def inverted(file: Path) -> None:
    """Another image, of the same size in bytes: noise cannot be compressed."""
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)


def recaptioned(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"red red", b"red bed"))


def edited(file: Path) -> None:
    file.write_text(file.read_text().replace(": ", ":\t", 1))


CHANGES = {
    "model/transformer/diffusion_pytorch_model.safetensors": retrained,
    "model/text_encoder/model.safetensors": retrained,
    "model/tokenizer/tokenizer_config.json": edited,
    "data/3.png": inverted,
    "data/metadata.csv": recaptioned,
    "start.safetensors": retrained,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_finished_run_whose_input_has_changed_is_neither_finished_nor_extended(name, trained):
    file = trained / name
    content = file.read_bytes()
    try:
        CHANGES[name](file)
        assert file.stat().st_size == len(content)
        with pytest.raises(ConfigError, match=rf"is finished, but \S+{file.name}: .* was \w+ and is \w+ now\. Restore"):
            claim(composed(trained))
        with pytest.raises(ValueError, match=rf"was trained with other inputs, .*{file.name}: its fing.*set name=…"):
            tiny.train(*arguments(trained), *MORE)
    finally:
        file.write_bytes(content)
    assert claim(composed(trained)) is None


def test_a_copy_or_a_checkout_with_other_times_is_the_same(trained, tmp_path, caplog):
    caplog.set_level("INFO")
    for file in [*(trained / "data").iterdir(), *(trained / "model").rglob("*")]:
        os.utime(file, (1, 1))
    assert claim(composed(trained)) is None and "is finished" in caplog.text
    copied = UnifiedDataset(shutil.copytree(trained / "data", tmp_path / "copy"))
    here, there = (describe(data.input_files()) for data in (UnifiedDataset(str(trained / "data")), copied))
    assert digest_of_all(here) == digest_of_all(there) and first_difference(here, there) is None and len(here) == 9


def test_images_and_captions_that_a_folder_gains_are_noticed(tmp_path):
    folder = tiny.write_dataset(tmp_path / "data", 2)
    (folder / "metadata.csv").unlink()
    for number in range(2):
        (folder / f"{number}.txt").write_text("a red cat")
    overrides = ["dataset.metadata=null", f"dataset.path={folder}", "max_steps=1", "batch_size=1"]
    tiny.train(tmp_path / "runs", *overrides)
    cfg = tiny.compose("train", *tiny.merged(tiny.train_overrides(tmp_path / "runs"), overrides))
    (folder / "notes.md").write_text("not read")
    assert claim(cfg) is None
    (folder / "0.txt").write_text("a bed cat")
    with pytest.raises(ConfigError, match=r"0\.txt: it has changed"):
        claim(cfg)
    (folder / "0.txt").write_text("a red cat")
    shutil.copy(folder / "0.png", folder / "7.png")
    with pytest.raises(ConfigError, match="data: the names of its images have changed"):
        claim(cfg)


def test_a_run_of_an_older_version_resumes_with_a_warning(trained, tmp_path, caplog):
    run_dir = Path(shutil.copytree(composed(trained).run_dir, tmp_path / "old"))
    (run_dir / "inputs.json").unlink()
    assert claim(composed(trained, f"run_dir={run_dir}")) is None
    assert "whether its data and weights have changed is not known" in caplog.text
    (folder,) = (run_dir / "checkpoints").glob("step-000002")
    content = read_checkpoint(folder)
    content["identity"] = {"data set": content["identity"]["data set"]}
    record = {"digest": checkpoint._digest_of(content), "content": content}
    (folder / INDEX).write_text(json.dumps(record))
    caplog.clear()
    assert tiny.train(*arguments(trained), f"run_dir={run_dir}", *MORE) == run_dir
    assert (
        "recorded no fingerprint of files of the data set, dit" in caplog.text
        and tiny.weights(run_dir)[-1] == "step-3.safetensors"
    )
