"""Prior preservation: the loss by hand, where its rows come from, and what it refuses."""

from pathlib import Path

import pytest
import tiny
import torch
from resumed import assert_same_run, losses, uninterrupted
from torch.testing import assert_close

from diffsynth.core.data import Augmentation, CachedDataset, MixedDataset, Row, SampleAddress, UnifiedDataset
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.flow_match import interpolate
from diffsynth.diffusion.loss import FlowMatchSFT, Prior, PriorPreservation
from diffsynth.diffusion.randomness import SampleRNG

LORA = LoRA(rank=2, target_modules=["to_q", "to_k"])
MARKS = [True, False, True]


def task(weight: float = 0.7, target: str = "base") -> PriorPreservation:
    return PriorPreservation(prior=Prior(weight=weight, target=target))


def marked(samples, marks=MARKS) -> list:
    pairs = zip(samples, marks, strict=True)
    return [sample._replace(data=Row({**sample.data, "regularisation": mark})) for sample, mark in pairs]


def shaken(module):
    """A module whose adapter changes the velocity."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.trainable_parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module


# The loss -------------------------------------------------------------------------------------------------------------


def by_hand(module, samples, base) -> torch.Tensor:
    """λ w(σ) mean ‖v_θ - v‖² of rows for regularisation, w(σ) mean ‖v_θ - (ε - x₀)‖² of the others.

    Args:
        base: A pipeline without adapters.
    """
    found = []
    for sample in samples:
        rng = SampleRNG(module.seed, [(sample.epoch, sample.index)])
        shared, posi, _ = module._frozen_inputs(sample, module.remembered)
        timestep, sigma = FlowMatchSFT().sample_timesteps(module.pipe.scheduler, rng)
        clean, weight = shared["input_latents"], module.pipe.scheduler.training_weight(timestep)
        noise = rng.normal("noise", clean)
        inputs = {**posi, **module.memory.inputs, "latents": interpolate(clean, noise, sigma)}
        with torch.no_grad():
            kept = base.predict(timestep, **inputs)
        target, factor = (kept, 0.7) if sample.data["regularisation"] else (noise - clean, 1)
        found.append(factor * weight * (module.pipe.predict(timestep, **inputs) - target).pow(2).mean())
    return torch.cat(found)


def gradients(module, losses) -> list[torch.Tensor]:
    return torch.autograd.grad(losses.sum(), module.trainable_parameters())


def test_the_loss_and_its_gradient_are_their_formula(training_module, load_pipe, tiny, samples):
    module, rows = shaken(training_module(task(), LORA)), marked(samples)
    expected, found = by_hand(module, rows, load_pipe(tiny)), module(rows)
    assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert found[0] > 1e-3  # the adapter has moved the class
    for own, other in zip(gradients(module, found), gradients(module, expected), strict=True):
        assert_close(own, other, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_a_new_adapter_has_moved_nothing_and_a_step_leaves_everything_as_it_was(training_module, samples):
    module = training_module(task(), LORA)
    found = module(marked(samples))
    assert found[0] == found[2] == 0 < found[1]
    before = [p.requires_grad for p in module.parameters()]
    found.sum().backward()
    assert [p.requires_grad for p in module.parameters()] == before
    assert list(module.roles.networks) == []  # no second copy of the base


@pytest.mark.slow
def test_images_are_learnt_with_their_weight_also_in_full(training_module, samples):
    plain = training_module()(samples)
    module = training_module(task(0.25, "images"))
    assert module.roles is None and not module.task.has_roles
    assert_close(module(marked(samples)), plain * torch.tensor([0.25, 1, 0.25]))


def test_without_marks_nothing_changes_and_the_base_is_not_asked(training_module, samples, monkeypatch):
    module = shaken(training_module(task(), LORA))
    plain = shaken(training_module(FlowMatchSFT(), LORA))
    monkeypatch.setattr(module.roles, "active", None)
    assert torch.equal(module(samples), plain(samples))
    assert torch.equal(module(marked(samples, [False] * 3)), plain(samples))


@pytest.mark.slow
def test_the_class_drifts_less(training_module, samples):
    """After steps on one image the base's prediction on the others is nearer with prior preservation."""

    def drift(marks) -> float:
        module = training_module(task(1.0), LORA)
        optimizer = torch.optim.Adam(module.trainable_parameters(), lr=0.02)
        for _ in range(20):
            module(marked(samples, marks) if any(marks) else samples[1:2]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return module(marked(samples))[[0, 2]].mean().item()

    assert drift(MARKS) < 0.5 * drift([False] * 3)


# What is refused ------------------------------------------------------------------------------------------------------

REFUSED = {
    "full": (
        task(),
        None,
        r"prior.target=base .* full training \(lora=none\) overwrites; set lora=lora, or set task.pr",
    ),
    "text": (
        task(),
        LoRA(rank=2, models=["text_encoder"], target_modules="all-linear"),
        r"but text_encoder is trained as well; set lora.models=\[di",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_training_that_changes_the_base_is_refused(name, training_module):
    objective, lora, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        training_module(objective, lora)


def test_a_column_regularisation_that_no_mixture_wrote_is_refused(training_module, samples):
    with pytest.raises(ValueError, match="the column regularisation is '1'; expected true or false, which dataset=mix"):
        training_module(task(target="images"))(marked(samples, ["1"] * 3))


# The data -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    tiny.write_dataset(folder / "subject", count=2)
    tiny.write_dataset(folder / "class", count=4)
    return folder


def mixed(folders: Path, regularisation=("class",)) -> MixedDataset:
    flip = Augmentation(flip=0.5)
    options = {"height": 32, "width": 32, "augmentation": flip}
    made = {name: UnifiedDataset.from_folder(str(folders / name), **options) for name in ("subject", "class")}
    return MixedDataset(made, regularisation=regularisation)


def test_rows_of_a_mixture_carry_their_mark_however_they_are_read(folders):
    made, plain = mixed(folders), mixed(folders, ())
    marks = [False] * 2 + [True] * 4
    assert [made[n]["regularisation"] for n in range(6)] == marks
    assert [made.sample(SampleAddress(3, n), 0)[0]["regularisation"] for n in range(6)] == marks
    assert [{r["regularisation"] for r in made.variants(n).rows.values()} for n in range(6)] == [{m} for m in marks]
    assert not plain.has_regularisation and not any("regularisation" in plain[n] for n in range(6))
    assert made.fingerprint() != plain.fingerprint()


WRONG = {
    "unknown": (("classes",), "dataset.regularisation names 'classes'; expected one of subject, class"),
    "all": (("subject", "class"), "names subject, class, which is every data set; take out those that"),
}


@pytest.mark.parametrize("name", WRONG)
def test_names_that_mean_nothing_are_refused(name, folders):
    regularisation, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        mixed(folders, regularisation)


# Runs -----------------------------------------------------------------------------------------------------------------


def overrides(folders: Path, regularisation: str = "[class]") -> list[str]:
    names = ("subject", "class")
    options = [f"+dataset@dataset.datasets.{name}=image_folder" for name in names]
    options += [f"dataset.datasets.{name}.path={folders / name}" for name in names]
    options += [f"dataset.datasets.{name}.{side}=32" for name in names for side in ("height", "width")]
    return ["dataset=mixed", *options, "dataset.weights={subject: 2}", f"dataset.regularisation={regularisation}"]


RUN = ["task=prior", "task.prior.weight=0.5", "optimizer.lr=1e-2"]


@pytest.mark.slow
def test_a_run_is_the_same_from_a_cache(folders, tmp_path):
    plain = tiny.train(tmp_path / "plain", *overrides(folders), *RUN)
    tiny.make_cache(tmp_path / "cache", *overrides(folders), "task=prior")
    assert CachedDataset(f"{tmp_path}/cache").has_regularisation
    cached = tiny.train(tmp_path / "two", "dataset=cache", f"dataset.path={tmp_path}/cache", *RUN)
    assert_close(losses(cached), losses(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_task_and_a_data_set_that_do_not_go_together_are_refused(folders, tmp_path):
    with pytest.raises(
        ValueError, match="has rows for regularisation, which FlowMatchSFT would train like all others;"
    ):
        tiny.train(tmp_path, *overrides(folders))
    with pytest.raises(
        ValueError, match="has no rows for regularisation, which task=prior needs; choose dataset=mixed"
    ):
        tiny.train(tmp_path, *overrides(folders, "[]"), *RUN)


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_as_if_nothing_had_been(folders, tmp_path):
    options = [*overrides(folders), *RUN, "checkpoint.every=2", "max_steps=5"]
    tiny.cut_off(2, tmp_path, *options)
    assert_same_run(tiny.train(tmp_path, *options), uninterrupted(*options))


@pytest.mark.slow
def test_two_processes_train_as_one(folders, tmp_path):
    import warm

    plain = tiny.train(tmp_path / "one", *overrides(folders), *RUN)
    given = tiny.merged(tiny.train_overrides(tmp_path / "two"), [*overrides(folders), *RUN])
    assert warm.ranks(2, tiny.run, given) == [0, 0]
    (run_dir,) = (tmp_path / "two").iterdir()
    assert_close(losses(run_dir), losses(plain), rtol=1e-4, atol=1e-5)
