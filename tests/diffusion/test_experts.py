"""Two experts: which levels each is trained on, which predicts at each step, and what a run of one of them loads."""

import pytest
import tiny
import torch
from families import FAMILIES
from miniatures.requests import made
from safetensors.torch import load_file
from test_family_contract import run

from diffsynth.core.data import Row, Sample, SampleAddress
from diffsynth.core.memory import FrozenMemory
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.experts import HIGH, LOW
from diffsynth.diffusion.flow_match import FlowMatchScheduler
from diffsynth.diffusion.pipeline.loaded_models import LoadedModels
from diffsynth.diffusion.randomness import SampleRNG, StratifiedRNG
from diffsynth.diffusion.timesteps import LogitNormalTimesteps, UniformTimesteps
from diffsynth.diffusion.trained import TrainProgress
from diffsynth.pipelines.wan import wan_sigmas

FAMILY = next(family for family in FAMILIES if family.name == "wan22_t2v_a14b")
BOUNDARY = 0.875


def module(*experts: str, **options):
    return FAMILY.module(lora=LoRA(rank=2, models=experts, target_modules=list(FAMILY.layers)), **options)


def scheduler(trained=None) -> FlowMatchScheduler:
    made = FlowMatchScheduler(wan_sigmas)
    made.set_timesteps(1000, training=True)
    made.trained = trained or made.trained
    return made


@pytest.mark.parametrize("expert, first, last", [(HIGH, 0, 416), (LOW, 417, 999)])
def test_an_expert_is_trained_on_the_originals_levels(expert, first, last):
    """DiffSynth-Studio's boundaries .417 are the indices 0 to 416 of the training grid, and 417 to 999."""
    levels = scheduler(FAMILY.build().trained_levels([expert]))
    u = torch.linspace(0, 1 - 1e-6, 4000)
    found = UniformTimesteps()(levels, u)
    assert torch.equal(found.unique(), levels.sigmas[first : last + 1].unique())
    assert (found[0], found[-1]) == (levels.sigmas[first], levels.sigmas[last])


@pytest.mark.parametrize("trained", [(BOUNDARY, 2.0), (0.0, BOUNDARY), (0.0, 2.0)])
@pytest.mark.parametrize("mu", [0.0, 1.6])
def test_a_logit_normal_distribution_is_cut_off_at_the_boundary(trained, mu):
    u, distribution = torch.linspace(0.0005, 0.9995, 4000), LogitNormalTimesteps(mu=mu)
    everywhere, found = distribution(scheduler(), u), distribution(scheduler(trained), u)
    expected = everywhere[(everywhere >= trained[0]) & (everywhere < trained[1])]
    assert trained[0] - 1e-4 <= found.min() and found.max() <= min(1, trained[1]) + 1e-4
    for share in (0.1, 0.5, 0.9):
        torch.testing.assert_close(found.quantile(share), expected.quantile(share), atol=5e-3, rtol=0)


def test_levels_that_leave_nothing_of_an_expert_are_refused():
    with pytest.raises(ValueError, match="min_boundary=0.5, task.timesteps.max_boundary=1.0 leave none of the noise"):
        UniformTimesteps(min_boundary=0.5)(scheduler((BOUNDARY, 2.0)), torch.zeros(1))


def test_the_boundary_decides_which_expert_predicts_in_each_step():
    pipe, steps = FAMILY.load(), []
    for name in (HIGH, LOW):
        getattr(pipe, name).register_forward_hook(lambda *_, name=name: steps.append(name))
    pipe.generate(
        [{"prompt": "a red apple", "seed": 0, "num_inference_steps": 6, "cfg_scale": 1.0, "cfg_scale_2": None}]
    )
    assert [name == HIGH for name in steps] == [sigma >= BOUNDARY for sigma in wan_sigmas(6)]
    assert {*steps} == {HIGH, LOW}


@pytest.mark.parametrize("expert, other", [(HIGH, LOW), (LOW, HIGH)])
def test_a_training_loads_and_moves_one_expert_and_the_other_one_only_if_it_samples(expert, other):
    training = module(expert).load()
    assert getattr(training.pipe, other) is None and training.pipe.in_iteration_models == (expert,)
    sample = Sample(Row({"video": made(FAMILY), "prompt": "a red apple"}), epoch=0, index=3)
    training([sample]).mean().backward()
    assert any(p.grad is not None for n, p in training.named_parameters() if n.startswith(f"pipe.{expert}."))
    sampling = module(expert).load(also=[HIGH, LOW])
    assert not any(p.requires_grad for p in getattr(sampling.pipe, other).parameters())
    rng = SampleRNG(0, [SampleAddress(0, 3)])
    torch.testing.assert_close(sampling.loss([sample], rng), training.loss([sample], rng))


def test_both_experts_are_trained_in_turns_by_their_share_of_the_levels():
    training = module(HIGH, LOW).load()
    parts = training.trained_parts()
    assert list(parts) == ["model", LOW]
    for part, expert in (("model", HIGH), (LOW, LOW)):
        assert parts[part] and all(name.startswith(f"pipe.{expert}.") for name in parts[part])
    turns = [training.trained_at(step) for step in range(2000)]
    assert turns == [training.trained_at(step) for step in range(2000)]
    assert turns.count(("model",)) / 2000 == pytest.approx(0.417, abs=0.03) and turns.count((LOW,)) > 1000


def test_a_step_of_both_moves_one_expert_and_held_out_losses_are_those_of_each_levels_expert():
    training = module(HIGH, LOW).load()
    samples = [Sample(Row({"video": made(FAMILY, n), "prompt": "a red apple"}), epoch=0, index=n) for n in range(3)]
    for step in range(6):
        training.zero_grad()
        training(samples, TrainProgress(step, 6)).mean().backward()
        moved = {name.split(".")[1] for name, p in training.named_parameters() if p.grad is not None}
        assert moved == {HIGH if training.trained_at(step) == ("model",) else LOW}
    bands = [Sample(samples[0].data, band, 0) for band in range(4)]
    together = training.loss(bands, rng_of(range(4)))
    alone = [training.loss([own], rng_of([band])) for band, own in enumerate(bands)]
    torch.testing.assert_close(together, torch.cat(alone))


def rng_of(bands) -> StratifiedRNG:
    """Random numbers of one row in quarters of the noise levels."""
    return StratifiedRNG(0, [SampleAddress(band, 0) for band in bands], 4)


def test_both_experts_beside_another_model_are_refused_with_what_to_set():
    layers = dict.fromkeys((HIGH, LOW), list(FAMILY.layers)) | {"text_encoder": ["q"]}
    lora = LoRA(rank=2, models=tuple(layers), target_modules=layers)
    with pytest.raises(ValueError, match=r"or both experts alone \(expert=both\); set one of them"):
        FAMILY.module(lora=lora).load()


def test_sampling_without_one_expert_is_refused_before_weights_are_read():
    pipe = FAMILY.build()
    pipe.drop_models([LOW])
    with pytest.raises(ValueError, match="sampling needs dit2, but model.dit2 is null; set model.dit2 to where"):
        LoadedModels(pipe, FrozenMemory())


def test_guidance_below_the_boundary_alone_is_refused():
    with pytest.raises(ValueError, match="cfg_scale_2 is 3.0, but cfg_scale=1 samples without a negative prompt"):
        FAMILY.build().complete({"prompt": "", "cfg_scale": 1.0, "cfg_scale_2": 3.0})


def test_an_adapter_of_each_expert_goes_to_its_own_network(tmp_path):
    from diffsynth.core.loader import save_safetensors

    for expert in (HIGH, LOW):
        tensors, metadata = module(expert).load().export_weights()["lora"]
        save_safetensors(tensors, tmp_path / f"{expert}.safetensors", metadata)
        assert FAMILY.build().adapted_by(tmp_path / f"{expert}.safetensors") == [expert]


def test_a_run_of_both_trains_each_resumes_and_exports_both(tmp_path, caplog):
    for steps in (3, 4):  # the second run goes on where the first one has ended
        in_two = tiny.run(run(FAMILY, tmp_path / "in_two", "expert=both", f"max_steps={steps}"))
    at_once = tiny.run(run(FAMILY, tmp_path / "at_once", "expert=both", "max_steps=4"))
    names = [f"epoch-1.{part}.safetensors" for part in ("lora", "lora_dit2")]
    for name, expert in zip(names, (HIGH, LOW), strict=True):
        found, expected = (load_file(folder / "weights" / name) for folder in (in_two, at_once))
        assert found and all(torch.equal(found[key], expected[key]) for key in expected)
        assert FAMILY.build().adapted_by(in_two / "weights" / name) == [expert]
    assert "EXPORT IS WRONG" not in caplog.text


def test_an_average_of_both_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ema averages the weights of one network, but dit and dit2 are trained in"):
        tiny.run(run(FAMILY, tmp_path, "expert=both", "ema=constant"))
