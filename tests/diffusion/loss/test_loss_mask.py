"""A loss that counts only where a mask is white, or that weighs white and black."""

import numpy as np
import pytest
import tiny as runs
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image
from torch.testing import assert_close

from diffsynth.config import claim
from diffsynth.core.data import Augmentation, Sample, SampleAddress, UnifiedDataset
from diffsynth.core.data.dataset import Row
from diffsynth.diffusion.loss import AutoencoderLoss, FlowMatchSFT, MaskWeights
from diffsynth.diffusion.loss.flow_match_sft import mean_where
from diffsynth.diffusion.pipeline import networks as models

MASKED = FlowMatchSFT(extra_inputs=["loss_mask"])
LATENTS = (6, 4)  # of the pictures in `samples`, 48 x 32 pixels
WEIGHTS = npst.arrays(np.float32, (2, 1, 3, 4), elements=st.floats(0, 1, width=32))
MASKS = WEIGHTS.filter(lambda weights: weights.sum((1, 2, 3)).min() > 0.01)


def image_of(weights) -> Image.Image:
    """A mask image of 8 x 8 pixels for each weight (h, w)."""
    return Image.fromarray(np.kron(255 * np.array(weights), np.ones((8, 8))).astype(np.uint8))


def with_masks(samples, *masks) -> list[Sample]:
    pairs = zip(samples, masks, strict=True)
    return [sample._replace(data=Row({**sample.data, "loss_mask": image_of(mask)})) for sample, mask in pairs]


def losses(module, samples) -> torch.Tensor:
    with torch.no_grad():
        return module(samples)


# The mean -------------------------------------------------------------------------------------------------------------


@given(MASKS)
def test_a_masked_mean_is_the_weighted_mean_over_places_of_each_sample(mask):
    values = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    expected = [np.average(v.mean(0), weights=m[0]) for v, m in zip(values.numpy(), mask, strict=True)]
    found = mean_where(values, torch.tensor(mask))
    assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=1e-5, rtol=1e-4)


@given(MASKS)
def test_how_large_a_mask_is_does_not_matter(mask):
    assert_close(mean_where(torch.full((2, 5, 3, 4), 3.0), torch.tensor(mask)), torch.full((2,), 3.0))


@given(MASKS.map(np.round).filter(lambda mask: mask.any((1, 2, 3)).all()))
def test_what_is_black_teaches_nothing(mask):
    values, mask = torch.ones(2, 5, 3, 4, requires_grad=True), torch.tensor(mask)
    mean_where(values, mask).sum().backward()
    assert torch.equal(values.grad != 0, (mask > 0).expand_as(values))


@given(MASKS, st.floats(0.01, 10), st.floats(0.01, 10))
def test_inside_and_outside_are_weighted(mask, inside, outside):
    values, mask = torch.rand(2, 5, 3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(mask)
    weights = (inside * mask + outside * (1 - mask)).numpy()
    expected = [np.average(v.mean(0), weights=w[0]) for v, w in zip(values.numpy(), weights, strict=True)]
    found = mean_where(values, MaskWeights(inside=inside, outside=outside)(mask))
    assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=1e-4, rtol=1e-4)


@given(MASKS)
def test_the_default_weights_are_the_mask_itself_and_equal_weights_are_none(mask):
    mask = torch.tensor(mask)
    assert torch.equal(MaskWeights()(mask), mask)
    values = torch.rand(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    assert_close(mean_where(values, MaskWeights(inside=2, outside=2)(mask)), mean_where(values, None))


def test_a_sample_without_any_weight_teaches_nothing():
    values, white = torch.ones(2, 5, 3, 4, requires_grad=True), torch.ones(2, 1, 3, 4)
    loss = mean_where(values, MaskWeights(inside=0, outside=1)(white))
    loss.sum().backward()
    assert not loss.any() and not values.grad.any()


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"inside": 0.0}, "task.mask.inside=0 and task.mask.outside=0 train nothing; set one of them above 0"),
        ({"outside": -1.0}, "task.mask.outside is -1.0; expected a number of at least 0"),
    ],
)
def test_weights_that_train_nothing_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        MaskWeights(**weights)


# The loss -------------------------------------------------------------------------------------------------------------


def test_the_losses_of_a_mask_and_of_its_negative_make_up_the_whole(training_module, samples):
    masks = np.random.default_rng(0).random((3, *LATENTS)) < [[[0.2]], [[0.5]], [[0.8]]]
    area = torch.tensor(masks.mean((1, 2)), dtype=torch.float32)
    module = training_module(MASKED)
    inside, outside = (losses(module, with_masks(samples, *each)) for each in (masks, ~masks))
    whole = losses(training_module(), samples)
    assert_close(area * inside + (1 - area) * outside, whole, atol=1e-5, rtol=1e-5)
    assert (inside - outside).abs().min() > 1e-3


def test_a_mask_is_read_from_the_column_that_the_task_names(training_module, samples):
    masks = np.random.default_rng(0).random((3, *LATENTS)) < 0.5
    masked = with_masks(samples, *masks)
    renamed = [s._replace(data=Row({**s.data, "face": s.data["loss_mask"], "loss_mask": None})) for s in masked]
    module = training_module(FlowMatchSFT(mask=MaskWeights(column="face")))
    assert torch.equal(losses(module, renamed), losses(training_module(MASKED), masked))


def test_a_loss_inside_and_outside_is_the_weighted_mean_of_both(training_module, samples):
    masks = np.random.default_rng(0).random((3, *LATENTS)) < 0.4
    area = torch.tensor(masks.mean((1, 2)), dtype=torch.float32)
    masked, negative = with_masks(samples, *masks), with_masks(samples, *~masks)
    module = training_module(MASKED)
    inside, outside = losses(module, masked), losses(module, negative)
    both = training_module(FlowMatchSFT(mask=MaskWeights(column="loss_mask", inside=2, outside=0.5)))
    expected = (2 * area * inside + 0.5 * (1 - area) * outside) / (2 * area + 0.5 * (1 - area))
    assert_close(losses(both, masked), expected, atol=1e-5, rtol=1e-5)


def test_a_white_mask_is_none_and_grey_is_half_of_white(training_module, samples):
    module, white = training_module(MASKED), np.ones(LATENTS)
    assert_close(losses(module, with_masks(samples, white, white, white)), losses(training_module(), samples))
    top = np.repeat([1.0, 0.0], 3)[:, None] * white
    grey, halves = losses(module, with_masks(samples[:1], 0.4 + 0.4 * top)), [top, 1 - top]
    first, second = (losses(module, with_masks(samples[:1], half)) for half in halves)
    assert_close(grey, (2 * first + second) / 3, atol=1e-5, rtol=1e-5)


def test_a_batch_has_the_losses_of_its_samples(training_module, samples):
    module = training_module(MASKED)
    masked = with_masks(samples, *(np.random.default_rng(0).random((3, *LATENTS)) < 0.5))
    assert_close(losses(module, masked), torch.cat([losses(module, [sample]) for sample in masked]))


def test_without_the_extra_input_a_mask_changes_no_bit_and_no_unit_reads_it(training_module, samples):
    module = training_module()
    masked = with_masks(samples, *np.zeros((3, *LATENTS)))
    assert torch.equal(losses(module, masked), losses(module, samples))
    assert not any("loss_mask" in unit.output_params for unit in module.units)


def test_a_black_mask_is_refused_with_its_sample(training_module, samples):
    masked = with_masks(samples[1:2], np.zeros(LATENTS))
    with pytest.raises(ValueError, match=r"sample 11 \('a red apple'\): loss_mask is black all over, .* white"):
        training_module(MASKED)(masked)


def test_a_mask_of_another_size_than_its_image_is_refused_with_its_sample(training_module, samples):
    masked = with_masks(samples[:1], np.ones((6, 6)))
    with pytest.raises(ValueError, match=r"sample 10 \(''\): loss_mask is 48 x 48 pixels and its image 32 x 48; save"):
        training_module(MASKED)(masked)


def test_an_objective_that_knows_no_mask_refuses_it(training_module):
    with pytest.raises(ValueError, match="task.extra_inputs: .* has no input 'loss_mask'"):
        training_module(AutoencoderLoss(extra_inputs=["loss_mask"]))


def test_sampling_reads_no_mask(pipe):
    assert "loss_mask" not in pipe.call_defaults
    with pytest.raises(ValueError, match="has no argument 'loss_mask'"):
        pipe.generate([{"prompt": "a", "loss_mask": None}])


# The data set ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pictures of 48 x 32, the mask of each the picture itself."""
    folder = tmp_path_factory.mktemp("masked")
    noise = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    rows = [{"image": f"{n}.png", "loss_mask": f"{n}.png", "prompt": f"picture {n}"} for n in range(3)]
    return runs.write_rows(folder, rows)


@pytest.mark.parametrize("size", [{"height": 32, "width": 32}, {"buckets": True, "max_pixels": 1024}, {}])
def test_a_mask_is_mirrored_and_cropped_as_its_image(folder, size):
    augmentation = Augmentation(flip=0.5, random_crop=True)
    keys = ["image", "loss_mask"]
    made = UnifiedDataset.from_folder(str(folder), data_file_keys=keys, augmentation=augmentation, **size)
    made.scan(required=keys)
    rows = [made.sample(SampleAddress(epoch, n), seed=0)[0] for epoch in range(8) for n in range(3)]
    assert all(row["image"] == row["loss_mask"] for row in rows)
    assert len({row["image"].tobytes() for row in rows}) > 5


FLIP = "dataset.augmentation.flip=0.5"
OVERRIDES = [FLIP, "dataset.data_file_keys=[image,loss_mask]", "task.extra_inputs=[loss_mask]"]


def losses_of(run_dir) -> list[float]:
    return [line["loss"] for line in runs.metrics(run_dir)]


# A mask that is made of each image, whose white area counts four times as much as the rest.
MADE = [
    FLIP,
    "condition=inpaint",
    "dataset.conditions.inpaint_mask.fixed=true",
    "dataset.conditions.inpaint_mask.whole=0",
    "task.mask.column=inpaint_mask",
    "task.mask.outside=0.25",
]


@pytest.mark.parametrize("masked", runs.mostly_slow([OVERRIDES, MADE], MADE), ids=["a file", "a condition"])
def test_a_masked_run_trains_alike_from_a_cache(folder, tmp_path, masked):
    given = runs.merged(runs.train_overrides(tmp_path), [f"dataset.path={folder}", *masked, "batch_size=2"])
    run_dir = runs.train(tmp_path, *given)
    own = [override for override in given if override.startswith(("dataset.", "condition=", "model.", "task."))]
    runs.call("make_cache", runs.compose("make_cache", *own, f"path={tmp_path}/cache", "device=cpu"))
    others = [override for override in given if not override.startswith(("dataset.", "condition="))]
    cached = runs.compose("train", "dataset=cache", f"dataset.path={tmp_path}/cache", FLIP, *others)
    cached_dir = claim(cached)
    runs.call("train", cached)
    assert_close(losses_of(cached_dir), losses_of(run_dir), rtol=1e-6, atol=1e-6)


def test_a_row_without_a_mask_is_named(tmp_path):
    with pytest.raises(ValueError, match="row 1: has no loss_mask, but image, prompt"):
        runs.train(tmp_path, *OVERRIDES)


@pytest.mark.parametrize("entry", ["train", "make_cache", "plan"])
@pytest.mark.parametrize("named", ["task.mask.column=loss_mask", "task.extra_inputs=[loss_mask]"])
def test_a_mask_that_is_not_read_as_a_file_is_refused_before_weights(folder, tmp_path, named, entry, monkeypatch):
    monkeypatch.setattr(models, "load_weights", lambda *_, **__: pytest.fail("weights are read"))
    own = [
        each for each in runs.train_overrides(tmp_path) if each.startswith(("dataset", "model.")) or entry == "train"
    ]
    path = [] if entry == "train" else [f"path={tmp_path}/made", "device=cpu"]
    cfg = runs.compose(entry, *runs.merged(own, [f"dataset.path={folder}", named, *path]))
    with pytest.raises(
        ValueError, match=r"column loss_mask is read as an image, .*dataset.data_file_keys=\[image,loss_mask\]"
    ):
        claim(cfg) if entry == "train" else None
        runs.call(entry, cfg)
