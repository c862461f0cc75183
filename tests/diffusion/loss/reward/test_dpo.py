"""Preference pairs: the loss by hand, its value and gradient at the base, its data, and a run on the embedded model."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from families import FAMILIES as TABLE
from miniatures.requests import samples as samples_of
from PIL import Image
from resumed import losses
from torch.testing import assert_close

from diffsynth.core.data import CachedDataset, Row, SampleAddress, UnifiedDataset
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.flow_match import interpolate
from diffsynth.diffusion.loss.reward import DPO
from diffsynth.diffusion.loss.reward.dpo import PairErrors, preference_loss
from diffsynth.diffusion.pipeline import networks as models
from diffsynth.diffusion.randomness import SampleRNG, StratifiedRNG

LORA = LoRA(rank=2, target_modules=["to_q", "to_k"])


def noise_image(seed: int, like: Image.Image) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (like.height, like.width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def paired(samples) -> list:
    """Each sample with a rejected image of noise."""
    rejected = [noise_image(99 + number, sample.data["image"]) for number, sample in enumerate(samples)]
    pairs = zip(samples, rejected, strict=True)
    return [sample._replace(data=Row({**sample.data, "rejected_image": image})) for sample, image in pairs]


def shaken(module):
    """A module whose adapter changes the velocity."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.trainable_parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module


# The loss -------------------------------------------------------------------------------------------------------------


def by_hand(module, sample, base) -> torch.Tensor:
    """-log sigmoid(-(β/2) (Δ_w - Δ_l)) + λ e_w, Δ the mean over the noise levels.

    Args:
        base: A pipeline without adapters.
    """
    task, row = module.task, sample.data
    rng = SampleRNG(module.seed, [SampleAddress(sample.epoch, sample.index)])
    _, posi, _ = module._frozen_inputs(sample, module.remembered)
    images = [base.vae.encode(base.preprocess_image(row[name])) for name in ("image", "rejected_image")]
    e_w, total = 0, 0
    for level in range(task.levels):
        sigma = task.timesteps(module.pipe.scheduler, (rng.uniform("timestep") + level) / task.levels)
        noise = rng.normal(f"noise {level}", images[0])
        errors = []
        for clean in images:
            inputs = {**posi, "latents": interpolate(clean, noise, sigma)}
            with torch.no_grad():
                of_base = (base.predict(sigma * 1000, **inputs) - (noise - clean)).pow(2).mean()
            own = (module.pipe.predict(sigma * 1000, **inputs) - (noise - clean)).pow(2).mean()
            errors.append((own, own - of_base))
        (own, chosen), (_, rejected) = errors
        e_w, total = e_w + own / task.levels, total + (chosen - rejected) / task.levels
    return torch.log1p(torch.exp(task.beta / 2 * total)) + task.anchor_weight * e_w


@pytest.mark.parametrize("levels", [1, 3])
def test_the_loss_and_its_gradient_are_their_formula(levels, training_module, load_pipe, tiny, samples):
    task = DPO(beta=30, levels=levels, anchor_weight=0.3)
    module, base, rows = shaken(training_module(task, LORA)), load_pipe(tiny), paired(samples)
    found, expected = module(rows), torch.stack([by_hand(module, sample, base) for sample in rows])
    assert len({*expected.tolist()}) == 3
    assert_close(found, expected, atol=1e-5, rtol=1e-4)
    gradients = [torch.autograd.grad(each.sum(), module.trainable_parameters()) for each in (found, expected)]
    for own, other in zip(*gradients, strict=True):
        assert_close(own, other, atol=1e-4, rtol=1e-3)
    assert list(module.roles.networks) == []  # no second copy of the base


def test_a_new_adapter_starts_at_log_2_with_every_pair_right(training_module, samples):
    module = training_module(DPO(), LORA)
    assert_close(module(paired(samples)), torch.full((3,), math.log(2)), rtol=0, atol=1e-6)
    same = PairErrors(*torch.rand(1, 3).expand(4, 3))
    assert same.figures()["accuracy"].tolist() == [1, 1, 1]


def test_the_figures_tell_the_two_images_apart():
    chosen, rejected = torch.tensor([2.0, 1.0]), torch.tensor([4.0, 1.0])
    figures = PairErrors(chosen, rejected, torch.tensor([1.0, 3.0]), torch.tensor([1.0, 5.0])).figures()
    assert figures["chosen_error"].tolist() == [1, -2] and figures["rejected_error"].tolist() == [3, -4]
    assert figures["accuracy"].tolist() == [1, 0]  # the rejected image became more likely by more


def test_at_the_base_the_gradient_of_the_velocity_is_known():
    """dL/dv_w = β (v_w - v*_w) / (2 D), and of the rejected image the same with the other sign."""
    generator = torch.Generator().manual_seed(0)
    velocity, target = torch.randn(2, 2, 5, 7, generator=generator, dtype=torch.float64)
    velocity.requires_grad_(True)
    base = velocity.detach()
    own, other = ((v - target).pow(2).flatten(1).mean(1) for v in (velocity, base))
    errors = PairErrors(own[:1], own[1:], other[:1], other[1:])
    preference_loss(errors.margin, beta=30.0).sum().backward()
    expected = 30.0 * (base - target) / (2 * 35) * torch.tensor([1.0, -1.0]).reshape(2, 1, 1)
    assert_close(velocity.grad, expected)


def test_the_loss_falls_where_the_chosen_image_gains():
    margins = torch.tensor([-0.1, 0.0, 0.1], requires_grad=True)
    found = preference_loss(margins, beta=20.0)
    assert_close(found, -torch.log(torch.sigmoid(10 * margins)))
    assert (torch.autograd.grad(found.sum(), margins)[0] < 0).all()


@pytest.mark.parametrize("levels", [1, 2])
def test_a_batch_has_the_losses_of_its_samples(levels, training_module, samples):
    module, rows = shaken(training_module(DPO(beta=30, levels=levels), LORA)), paired(samples)
    with torch.no_grad():
        assert_close(module(rows), torch.cat([module([row]) for row in rows]), atol=1e-5, rtol=1e-4)


def test_levels_cover_the_distribution_evenly_whatever_the_random_number(training_module, samples, monkeypatch):
    module, seen = training_module(DPO(levels=4), LORA), []
    own = type(module.task.timesteps).__call__
    monkeypatch.setattr(
        type(module.task.timesteps), "__call__", lambda self, scheduler, u: seen.append(u) or own(self, scheduler, u)
    )
    module(paired(samples))
    assert [[int(4 * number) for number in level] for level in seen] == [[level] * 3 for level in range(4)]
    assert all(torch.equal(level - level.floor(), level) for level in seen)
    with torch.no_grad():  # the evenly spread levels of an evaluation are spread evenly within each part
        module.loss(paired(samples), StratifiedRNG(0, [SampleAddress(band, 0) for band in range(3)], bands=3))
    assert [int(12 * number) for number in torch.stack(seen[4:]).flatten().sort().values] == list(range(12))


def test_swapping_the_pair_flips_the_margin_and_gradients_leave_the_adapter_alone(training_module, samples):
    module, rows = shaken(training_module(DPO(beta=30), LORA)), paired(samples)
    swapped = [
        row._replace(data=Row({**row.data, "image": row.data["rejected_image"], "rejected_image": row.data["image"]}))
        for row in rows
    ]
    before = [parameter.requires_grad for parameter in module.parameters()]
    losses_ = module(rows)
    with torch.no_grad():
        other = module(swapped)
    assert_close((-losses_).exp() + (-other).exp(), torch.ones(3))  # sigmoid(m) + sigmoid(-m)
    losses_.sum().backward()
    assert [parameter.requires_grad for parameter in module.parameters()] == before
    reached = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached and reached <= set(module.trained_parts()["model"])


def test_checkpointing_changes_no_gradient(training_module, samples):
    found = []
    for kind in ("none", "blocks"):
        module = shaken(training_module(DPO(beta=30), LORA, checkpointing=kind))
        found.append(torch.autograd.grad(module(paired(samples)).sum(), module.trainable_parameters()))
    for own, other in zip(*found, strict=True):
        assert torch.equal(own, other) and own.any()


IMAGES = {str(family): family for family in TABLE if not family.num_frames}


@pytest.mark.parametrize("name", tiny.mostly_slow(IMAGES, "sd3_5_medium"))
def test_every_family_of_images_compares_pairs(name):
    family = IMAGES[name]
    module = family.module(DPO(extra_inputs=family.extra_inputs), LoRA(rank=2)).load()
    rows = paired(samples_of(family)[:2])
    found = module(rows)
    assert_close(found, torch.full((2,), math.log(2)), rtol=0, atol=1e-5)
    gradients = torch.autograd.grad(found.sum(), module.trainable_parameters(), allow_unused=True)
    assert any(own is not None and own.any() for own in gradients)
    frozen = {name for unit in module.frozen_units for name in unit.output_params}
    assert {"input_latents", "rejected_latents"} <= frozen


# The data -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Eight pairs of 32 × 32 pixels; the rejected picture of each is that of the next."""
    folder = tiny.write_dataset(tmp_path_factory.mktemp("pairs") / "data")
    return tiny.write_rows(folder, rows_of_pairs())


def rows_of_pairs() -> list[dict]:
    return [{"image": f"{n}.png", "rejected_image": f"{(n + 1) % 8}.png", "prompt": f"square {n}"} for n in range(8)]


RUN = ["task=reward/dpo", "optimizer.lr=1e-2", "task.beta=100"]


@pytest.mark.parametrize("size", [{"height": 32, "width": 32}, {"buckets": True, "max_pixels": 1024}])
def test_a_pair_is_cropped_and_mirrored_together(size, tmp_path):
    from diffsynth.core.data import Augmentation

    tiny.write_dataset(tmp_path / "data", count=2, size=48)
    tiny.write_rows(tmp_path / "data", [{"image": "0.png", "rejected_image": "1.png", "prompt": "a"}])
    data = UnifiedDataset.from_folder(str(tmp_path / "data"), augmentation=Augmentation(flip=0.5), **size)
    data.read_images_of("rejected_image")
    data.scan(required=["image", "rejected_image"])
    rows = [data.sample(SampleAddress(epoch, 0), seed=0)[0] for epoch in range(8)]
    assert {row["rejected_image"].size for row in rows} == {(32, 32)}
    pairs = {(row["image"].tobytes(), row["rejected_image"].tobytes()) for row in rows}
    assert len(pairs) == 2  # plain and mirrored, never one of each


def test_a_run_is_the_same_from_a_cache_and_needs_no_autoencoder(pairs, tmp_path):
    given = [f"dataset.path={pairs}", *RUN]
    plain = tiny.train(tmp_path / "plain", *given)
    tiny.make_cache(tmp_path / "cache", f"dataset.path={pairs}", "task=reward/dpo")
    cached = ["dataset=cache", f"dataset.path={tmp_path}/cache", *RUN]
    two = tiny.train(tmp_path / "two", *cached)
    assert losses(two)[0] == pytest.approx(math.log(2), abs=1e-5) != losses(two)[1]
    assert_close(losses(two), losses(plain), rtol=1e-5, atol=1e-6)
    first = tiny.metrics(two)[0]
    assert (first["accuracy"], first["chosen_error"], first["rejected_error"]) == (1, 0, 0)
    made = CachedDataset(f"{tmp_path}/cache")[0].made["shared"]
    assert not torch.equal(made["input_latents"], made["rejected_latents"])


def test_a_cache_of_another_task_is_refused(pairs, tmp_path):
    tiny.make_cache(tmp_path / "cache", f"dataset.path={pairs}")
    with pytest.raises(ValueError, match="not made for this training:(.|\n)*rejected_latents"):
        tiny.train(tmp_path, "dataset=cache", f"dataset.path={tmp_path}/cache", *RUN)


@pytest.mark.slow
def test_a_run_of_pairs_is_planned(pairs, tmp_path):
    given = tiny.merged(tiny.train_overrides(tmp_path), [f"dataset.path={pairs}", "task=reward/dpo"])
    kept = [override for override in given if override.startswith(("dataset.", "task"))]
    said = tiny.call("plan", tiny.compose("plan", "model=emoji", *kept, f"path={tmp_path}/plan"))
    assert "| train" in said and "| cache |" in said


# What is refused ------------------------------------------------------------------------------------------------------


def table(folder: Path, **cells: str | None) -> str:
    """The table of a folder, with other cells in its third row; None leaves the column out."""
    rows = rows_of_pairs()
    rows[2] |= cells
    if None in cells.values():
        rows = [{name: value for name, value in row.items() if cells.get(name, "") is not None} for row in rows]
    name = "others.csv"
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return name


FREE = ["dataset.height=null", "dataset.width=null", "micro_batch_size=1"]
REFUSED = {
    "no column": ({"rejected_image": None}, [], "row 1: has no rejected_image, but image, prompt"),
    "no name": ({"rejected_image": ""}, [], "row 3: rejected_image is empty"),
    "no file": ({"rejected_image": "gone.png"}, [], "row 3: rejected_image 'gone.png': not found"),
    "one file": ({"rejected_image": "2.png"}, [], "row 3: rejected_image '2.png' is the same picture as image; name"),
    "a copy": ({"rejected_image": "copy.png"}, [], "row 3: rejected_image 'copy.png' is the same picture as image"),
    "size": (
        {"rejected_image": "wide.png"},
        FREE,
        r"row 3: image is trained at 32 x 32 pixels and rejected_image at 48 x 32; set dataset.height=…",
    ),
    "full": ({}, ["lora=none"], r"task=reward/dpo needs the base as it was, which full training \(lora=none\) over"),
    "text": (
        {},
        ["lora.models=[text_encoder]", "lora.target_modules=all-linear"],
        r"but text_encoder is trained as well; set lora.models=\[dit\]",
    ),
    "beta": ({}, ["task.beta=0"], r"task.beta is 0 \(int\); expected a number above 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_pairs_are_refused_before_weights(name, pairs, tmp_path, no_weights_are_read):
    cells, options, message = REFUSED[name]
    (pairs / "copy.png").write_bytes((pairs / "2.png").read_bytes())
    Image.new("RGB", (48, 32)).save(pairs / "wide.png")
    with pytest.raises(ValueError, match=message):
        tiny.train(tmp_path, f"dataset.path={pairs}", f"dataset.metadata={table(pairs, **cells)}", *RUN, *options)


def test_pairs_of_other_sizes_are_cropped_to_one(pairs, tmp_path):
    Image.new("RGB", (48, 32)).save(pairs / "wide.png")
    metadata = table(pairs, rejected_image="wide.png")
    assert len(losses(tiny.train(tmp_path, f"dataset.path={pairs}", f"dataset.metadata={metadata}", *RUN))) == 2


def test_equal_pixels_in_files_of_other_formats_are_named_with_their_sample(training_module, samples):
    module, row = training_module(DPO(), LORA), samples[1].data
    with pytest.raises(ValueError, match=r"sample 11 \('a red apple'\): image and rejected_image have the same pixels"):
        module([samples[1]._replace(data=Row({**row, "rejected_image": row["image"].copy()}))])
    other = noise_image(0, Image.new("RGB", (32, 32)))
    with pytest.raises(ValueError, match=r"sample 11 .*image has 32 x 48 pixels and rejected_image 32 x 32; expected"):
        module([samples[1]._replace(data=Row({**row, "rejected_image": other}))])


def test_a_model_of_videos_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_weights", lambda *_, **__: pytest.fail("weights are read"))
    cfg = tiny.compose("train", "model=emoji_wan", "task=reward/dpo", f"output_root={tmp_path}", "device=cpu")
    with pytest.raises(ValueError, match="DPO compares image and rejected_image, but the model makes videos; choose a"):
        tiny.call("train", cfg)


# A run ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_the_embedded_model_the_margin_of_pairs_that_it_never_saw_rises(tmp_path):
    """Colour is chosen and line art rejected, for prompts that name neither."""
    for part in ("train", "held_out"):
        names = [row["image"].partition("/")[2] for row in csv.DictReader((DATA / f"color_{part}.csv").open())]
        rows = [pair for pair in map(emoji_pair, names) if (DATA / pair["rejected_image"]).exists()]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"dataset.path={DATA}", f"dataset.metadata={tmp_path}/train.jsonl", "dataset=image_folder"]
    held_out = (
        "{_target_: diffsynth.core.data.UnifiedDataset.from_folder, path: %s, metadata: %s, height: 64, width: 64}"
    )
    run_dir = tiny.run(
        [
            "task=reward/dpo",
            *data,
            "dataset.height=64",
            "dataset.width=64",
            "+validation.datasets.held_out=" + held_out % (DATA, f"{tmp_path}/held_out.jsonl"),
            "validation.loss_samples=8",
            "validation.row_samples=0",
            "max_steps=12",
            "batch_size=4",
            "task.beta=20",
            "optimizer.lr=5e-4",
            "lr_scheduler=constant",
            "logger.every=1",
            "device=cpu",
            f"output_root={tmp_path}",
        ]
    )
    found = [line["held_out_loss"] for line in tiny.metrics(run_dir) if "held_out_loss" in line]
    assert found[0] == pytest.approx(math.log(2), abs=1e-4)
    assert found[-1] < 0.3  # mean -log sigmoid of the margins


DATA = tiny.ROOT / "data" / "emoji"


def emoji_pair(name: str) -> dict:
    title = Path(name).stem.replace("-", " ")
    return {"image": f"color/{name}", "rejected_image": f"line/{name}", "prompt": f"an emoji of {title}"}
