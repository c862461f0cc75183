"""Looking at a run: what is measured, and what is kept for it."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from families import FAMILIES, pairs
from PIL import Image
from safetensors.torch import load_file

from diffsynth.core import sharing
from diffsynth.diffusion.base_pipeline import BasePipeline
from diffsynth.diffusion.pipeline.media import ImageMedia
from diffsynth.training.ema import EMA
from diffsynth.training.validation import Validation

HELD_OUT = [
    "+validation.datasets.held_out={_target_: diffsynth.core.data.UnifiedDataset.from_folder, height: 32, width: 32}",
    f"+validation.datasets.held_out.path={tiny.dataset()}",
]
EVALUATING = ["validation=base", "validation.every=1", "validation.loss_samples=3", *HELD_OUT]


class Pairs(ImageMedia):
    """Sampled values are pairs of images, and every thumbnail is red."""

    def postprocess(self, pixels):
        return (super().postprocess(pixels),) * 2

    def thumbnail(self, value):
        image = value[0] if isinstance(value, tuple) else value
        return Image.new("RGB", image.size, "red")


def evaluations(run_dir) -> list[dict]:
    return [line for line in tiny.metrics(run_dir) if "held_out_loss" in line]


def test_the_loss_is_the_mean_of_its_bands_and_has_an_error(tmp_path):
    for evaluation in evaluations(tiny.train(tmp_path, *EVALUATING)):
        bands = [evaluation[f"held_out_loss_band{number}"] for number in (1, 2, 3, 4)]
        assert evaluation["held_out_loss"] == pytest.approx(sum(bands) / 4)
        assert len(set(bands)) == 4 and 0 < evaluation["held_out_loss_error"] < evaluation["held_out_loss"]


def test_the_average_is_evaluated_and_exported_beside_the_raw_weights(tmp_path):
    average = ["ema=constant", "ema.decay=0.9", "validation.weights=[raw,ema]", "optimizer.lr=0.1"]
    run_dir = tiny.train(tmp_path, *EVALUATING, *average)
    first, *_, last = evaluations(run_dir)
    assert first["ema_held_out_loss"] == first["held_out_loss"] and last["ema_held_out_loss"] != last["held_out_loss"]
    raw, averaged = (load_file(run_dir / "weights" / f"epoch-0{mark}.safetensors") for mark in ("", ".ema"))
    assert raw.keys() == averaged.keys() and any((raw[key] != averaged[key]).any() for key in raw)


def test_the_average_is_put_in_place_only_where_something_is_saved(tmp_path, monkeypatch):
    placed, in_place = [], EMA.in_place
    monkeypatch.setattr(EMA, "in_place", lambda self, parameters: placed.append(1) or in_place(self, parameters))
    tiny.train(tmp_path, "max_steps=4", "export.save_steps=2", "ema=constant")
    assert len(placed) == 2


def test_a_process_without_an_item_gets_what_the_others_made(monkeypatch):
    last_of_four = SimpleNamespace(process_index=3, num_processes=4)
    monkeypatch.setattr(sharing, "PartialState", lambda: last_of_four)
    monkeypatch.setattr(sharing, "gather_object", lambda mine: [*mine, (1, "b"), (0, "a")])
    assert sharing.share(["x", "y"], lambda mine: [mine[0]]) == ["a", "b"]


def test_losses_are_read_without_fp64_which_macs_do_not_have(tmp_path):
    class OnMac(torch.Tensor):
        def double(self):
            raise TypeError("MPS has no float64")

    losses = torch.tensor([1.0, 2.0, 3.0, 4.0]).as_subclass(OnMac)
    module = SimpleNamespace(loss=lambda *given: losses)
    assert Validation(tmp_path)._row_losses(module, {}, 0) == [1.0, 2.0, 3.0, 4.0]


def test_the_best_weights_are_those_of_the_lowest_loss(tmp_path):
    steps = ["max_steps=3", "export.save_steps=1", "optimizer.lr=0.3", "export.keep_best=held_out_loss"]
    run_dir = tiny.train(tmp_path, *EVALUATING, *steps)
    best = json.loads((run_dir / "weights" / "best.json").read_text())
    first, *later = evaluations(run_dir)
    lowest = min([*later, first], key=lambda evaluation: evaluation["held_out_loss"])
    assert (best["step"], best["value"]) == (lowest["step"], lowest["held_out_loss"])


@pytest.mark.parametrize(
    "overrides, answer",
    [
        (["export.keep_best=held_out_los"], "'held_out_los', .* set export.keep_best to one of held_out_loss"),
        (["validation.weights=[raw,emma]"], "validation.weights names 'emma'; expected raw, ema or both"),
        (["validation.weights=[ema]"], "has no average of its weights; set ema=constant or ema=power"),
    ],
)
def test_what_is_not_measured_is_refused_before_weights_are_read(overrides, answer, tmp_path, monkeypatch):
    monkeypatch.setattr("diffsynth.diffusion.pipeline.networks.load_weights", None)
    with pytest.raises(ValueError, match=answer):
        tiny.train(tmp_path, *EVALUATING, *overrides)


def test_what_is_shown_and_measured_are_the_thumbnails_of_the_familys_media(tmp_path, monkeypatch):
    monkeypatch.setattr(BasePipeline, "media", Pairs())
    sampled = ["validation.prompts=[a dog]", "validation.metric_samples=2", "validation.row_samples=1"]
    sampled += ["validation.options={num_inference_steps: 1, height: 32, width: 32}"]
    metric = "+validation.metrics.retrieval._target_=diffsynth.training.validation.metrics.Retrieval"
    report = ["data_report.pictures=2", "data_report.rows=2", "max_steps=1"]
    run_dir = tiny.train(tmp_path, *EVALUATING, *sampled, metric, *report)
    assert (
        evaluations(run_dir)[0]["held_out_retrieval"] == 0.5
    )  # all thumbnails are equal, and the first counts as nearest
    pictures = [run_dir / "data_report.png", *(run_dir / "samples").glob("*step-000000.png")]
    assert [Image.open(picture).convert("RGB").getpixel((0, 0)) for picture in pictures] == [(255, 0, 0)] * 3


CONTROLLED = next(family for family in FAMILIES if family.name == "z_image_controlnet")


def test_prompts_that_are_sampled_without_the_images_of_the_training_are_warned_of(tmp_path, caplog):
    module = CONTROLLED.module()
    Validation(path=tmp_path, prompts=["a cat"]).models(module)
    (record,) = caplog.records
    assert "validation.prompts are sampled without controlnet_image" in record.getMessage()
    assert "validation=emoji_control" in record.getMessage()
    caplog.clear()
    options = {"controlnet_image": Image.new("RGB", (32, 32))}
    Validation(path=tmp_path, prompts=["a cat"], options=options).models(module)
    Validation(path=tmp_path).models(module)
    assert not caplog.records
    assert Validation(path=tmp_path).shown_rows(module) == 4
    assert Validation(path=tmp_path, row_samples=0).shown_rows(module) == 0
    assert Validation(path=tmp_path).shown_rows(FAMILIES[0].module()) == 0


def test_rows_of_a_training_that_is_controlled_are_sampled_with_their_images(tmp_path):
    where = [f"path={pairs()}", "metadata=metadata.jsonl", "height=32", "width=32"]
    data = ["dataset=image_folder", *(f"dataset.{setting}" for setting in where)]
    node = "{_target_: diffsynth.core.data.UnifiedDataset.from_folder, data_file_keys: [image, controlnet_image]}"
    held_out = [f"+validation.datasets.held_out={node}", *(f"+validation.datasets.held_out.{own}" for own in where)]
    size = ["validation.options={num_inference_steps: 1, height: 32, width: 32}", "validation.loss_samples=1"]
    few = ["max_steps=1", "validation=base", "lora=none", "task.trainable_models=[controlnet]"]
    run_dir = tiny.train(tmp_path, *CONTROLLED.overrides, *data, *held_out, *size, *few)
    assert list((run_dir / "samples").glob("held_out_*step-000000.png"))
