"""What a run says of its data before it trains on them."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from diffsynth.core.data import Row, UnifiedDataset
from diffsynth.core.data.conditions import MaskedImage, RandomMask
from diffsynth.diffusion.pipeline.media import ImageMedia
from diffsynth.training.record import data_report as reports

ONE_STEP = ["max_steps=1", "data_report.rows=8", "data_report.pictures=4"]


def picture(number: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


@pytest.fixture
def folder(tmp_path):
    """Four pictures: one is too small, one has a caption longer than the model reads."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, size in enumerate([(32, 32), (16, 16), (64, 32), (32, 32)]):
        picture(number, size).save(folder / f"{number}.png")
    captions = ["a dog", "a cat", "a bird", "a very long word " * 400]
    return tiny.write_rows(folder, [{"image": f"{n}.png", "prompt": text} for n, text in enumerate(captions)])


def colours(run_dir) -> int:
    """How many colours there are in a data report's picture, roughly."""
    sheet = Image.open(run_dir / "data_report.png").convert("RGB").resize((64, 16))
    return len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0))


def data_report(run_dir) -> dict:
    return json.loads((run_dir / "data_report.json").read_text())


def test_a_run_counts_its_samples_and_names_what_is_enlarged_or_cut_off(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    content = data_report(tiny.train(tmp_path / "runs", *ONE_STEP, f"dataset.path={folder}", "dataset.repeat=3"))
    assert (content["samples"], content["an_epoch"], content["sizes"]) == (4, 12, {"32x32": 4})
    assert (content["enlarged"], content["caption_cut_off"], content["skipped"]) == ([1], [3], [])
    assert (content["caption_tokens_read"], content["caption_tokens_key"]) == (1024 + 34, None)
    assert "1 with a caption that is cut off after 1058 tokens" in caplog.text


def test_rows_that_are_skipped_are_listed_with_the_reason(folder, tmp_path):
    (folder / "2.png").write_bytes(b"<html>")
    content = data_report(tiny.train(tmp_path / "runs", *ONE_STEP, f"dataset.path={folder}", "dataset.on_error=skip"))
    (skipped,) = content["skipped"]
    assert skipped["row"] == 3 and "begins with b'<html>'" in skipped["reason"] and content["samples"] == 3


def validated_on(name: str, folder: Path) -> list[str]:
    """Overrides of a validation data set."""
    target = "{_target_: diffsynth.core.data.UnifiedDataset.from_folder, height: 32, width: 32}"
    added = [f"+validation.datasets.{name}={target}", f"+validation.datasets.{name}.path={folder}"]
    return ["validation=base", "validation.loss_samples=1", *added]


def report_and_log(tmp_path, caplog, *overrides: str) -> tuple[dict, str]:
    with caplog.at_level("INFO"):
        return data_report(tiny.train(tmp_path / "runs", *ONE_STEP, *overrides)), caplog.text


def test_images_that_are_validated_on_as_well_are_found_though_they_were_saved_again(folder, tmp_path, caplog):
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    picture(3).save(held_out / "again.jpg", quality=95, subsampling=0)
    picture(9).save(held_out / "other.png")
    tiny.write_rows(held_out, [{"image": name, "prompt": "a dog"} for name in ("other.png", "again.jpg")])
    content, log = report_and_log(tmp_path, caplog, f"dataset.path={folder}", *validated_on("held_out", held_out))
    assert content["also_in_validation"] == {"held_out": [[3, 1]]}
    assert "1 nearly equal to one of validation.datasets.held_out" in log


def test_a_validation_data_set_of_the_same_rows_is_named_and_not_compared(folder, tmp_path, caplog):
    content, log = report_and_log(tmp_path, caplog, f"dataset.path={folder}", *validated_on("same", folder))
    assert (content["also_in_validation"], content["validation_of_the_same_rows"]) == ({}, ["same"])
    assert "validation.datasets.same has the same rows" in log


def test_the_first_samples_are_shown_as_they_are_trained_on(folder, tmp_path):
    run_dir = tiny.train(tmp_path / "runs", *ONE_STEP, f"dataset.path={folder}", "dataset.augmentation.flip=1")
    sheet = np.asarray(Image.open(run_dir / "data_report.png").convert("RGB"))
    mirrored = [np.asarray(picture(n).transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((128, 128))) for n in (0, 3)]
    cells = [sheet[:128, x : x + 128] for x in range(0, 512, 128)]
    assert all(any(np.abs(cell.astype(int) - image).mean() < 20 for cell in cells) for image in mirrored)


def test_what_is_made_of_an_image_is_shown_below_it(folder):
    conditions = {"inpaint_mask": RandomMask(whole=0), "controlnet_image": MaskedImage()}
    sample = UnifiedDataset.from_folder(str(folder), height=32, width=32, conditions=conditions)[0]
    (images,) = reports._pictures(SimpleNamespace(media=ImageMedia()), [sample])
    assert images == [sample[column] for column in ("image", "inpaint_mask", "controlnet_image")]


def test_samples_of_a_cache_are_decoded_where_there_is_a_decoder(folder, tmp_path, monkeypatch):
    data = ["dataset=image_folder", f"dataset.path={folder}", "dataset.height=32", "dataset.width=32"]
    tiny.command_line(monkeypatch, "make_cache.py", *tiny.model_overrides(), *data, f"path={tmp_path / 'cache'}")
    cached = ["dataset=cache", f"dataset.path={tmp_path / 'cache'}"]
    run_dir = tiny.train(tmp_path / "runs", *ONE_STEP, *cached)
    assert data_report(run_dir)["sizes"] == {"32x32": 4}
    assert colours(run_dir) > 100
    without = tiny.train(tmp_path / "runs", *ONE_STEP, *cached, "model.vae=null", "model.text_encoder=null")
    assert colours(without) < 100


def test_masks_and_images_of_a_cache_are_shown_under_its_samples():
    pipe = SimpleNamespace(
        device="cpu",
        call_defaults={},
        vae=object(),
        decoding_models=["vae"],
        loaded=lambda names: nullcontext(),
        media=ImageMedia(),
    )
    pipe.decode = lambda latents, request: Image.new("RGB", (32, 32), (int(latents.mean()), 0, 0))
    mask = torch.tensor([[0.0, 1.0], [1.0, 0.0]])[None, None]
    latents = {"input_latents": torch.full((1, 16, 4, 4), 50.0), "edit_latents": [torch.full((1, 16, 4, 4), 90.0)]}
    kept = {"loss_mask": mask, "input_image": Image.new("RGB", (8, 8), "blue"), "prompt_emb": torch.zeros(1, 3, 8)}
    (images,) = reports._pictures(pipe, [Row({"prompt": "a"}, {"shared": latents | kept})])
    shown = [image.convert("RGB").getpixel((0, 0)) for image in images]
    assert shown == [(50, 0, 0), (90, 0, 0), (0, 0, 0), (0, 0, 255)]
