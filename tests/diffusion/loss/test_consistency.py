"""Consistency distillation: Hyper-SD's segments and latent consistency, against numbers written out by hand."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import BaseTunerLayer

from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.distillation.context import LossContext
from diffsynth.diffusion.distillation.roles import STUDENT, TEACHER
from diffsynth.diffusion.distillation.settings import Student
from diffsynth.diffusion.loss.consistency import Consistency, spans_at
from diffsynth.diffusion.loss.hyper_sd import HyperSD
from diffsynth.diffusion.loss.lcm import LatentConsistency
from diffsynth.diffusion.trained import TrainProgress
from diffsynth.pipelines.qwen_image import pack_latents, qwen_image_sigmas, unpack_latents

SIZE = {"height": 16, "width": 16}


class LinearPipe:
    """A family that samples in n steps at 1, (n - 1) / n, …, 1 / n."""

    @contextmanager
    def sampling_steps(self, request):
        steps, sigmas = request["num_inference_steps"], request["sigmas"]
        yield SimpleNamespace(levels=[*(sigmas or [1 - n / steps for n in range(steps)]), 0.0])


class LinearRoles:
    """The teacher predicts guidance · x, the student weight · x + σ."""

    def __init__(self, weight: float = 1.0):
        self.weight, self.seen = torch.tensor(weight, requires_grad=True), []

    def velocity(self, role, latents, sigma, inputs, negative=None, guidance=1, trained=False):
        self.seen.append((role, sigma.tolist(), torch.is_grad_enabled(), trained))
        if role == TEACHER:
            assert negative == {"prompt_emb": "of nothing"} and inputs == {"prompt_emb": "of a cat"}
            return guidance * latents
        weight = self.weight if trained else self.weight.detach()
        return weight * latents + sigma.reshape(-1, 1, 1, 1)


class FixedDraw:
    """ε = 3 everywhere, and t where it is told."""

    def __init__(self, *uniform: float):
        self.numbers = uniform

    def uniform(self, purpose):
        return torch.tensor(self.numbers)

    def normal(self, purpose, like):
        return torch.full_like(like, 3.0)


def losses(task, *uniform: float, roles=None, progress=None) -> torch.Tensor:
    """Of pictures x₀ = 1, one for each of the uniform numbers."""
    clean = torch.ones(len(uniform), 1, 2, 2)
    sides = {"negative": {"prompt_emb": "of nothing"}, "prompt_emb": "of a cat", "input_latents": clean}
    roles = roles or LinearRoles()
    return task(LinearPipe(), FixedDraw(*uniform), roles=roles, progress=progress, **sides, **SIZE)


TWO_SEGMENTS = HyperSD(student=Student(num_inference_steps=2), segments=[4, 2], grid_steps=4, guidance=2)
ONE_SEGMENT = LatentConsistency(grid_steps=4, guidance=2)
AT_1, AT_0_75, AT_0_5, AT_0_25 = 0.9, 0.6, 0.3, 0.1  # uniform numbers that lead to these of the levels 0.25 … 1


def test_hyper_sd_is_its_central_equation():
    # t = 1, x = ε = 3; the teacher's step 3 + (0.75 - 1) · 2 · 3 = 1.5 to t' = 0.75; s = 0.5.
    # The student from there: 1.5 + (0.5 - 0.75) · (1.5 + 0.75) = 0.9375; from x: 3 + (0.5 - 1) · (3 + 1) = 1.
    (loss,) = losses(TWO_SEGMENTS, AT_1)
    assert loss.item() == pytest.approx((1 - 0.9375) ** 2 / 0.5**2)


def test_latent_consistency_is_its_central_equation():
    # As above with s = 0: 1.5 - 0.75 · (1.5 + 0.75) = -0.1875 and 3 - 1 · (3 + 1) = -1.
    (loss,) = losses(ONE_SEGMENT, AT_1)
    assert loss.item() == pytest.approx((1 - 0.1875) ** 2)


def test_at_an_edge_the_target_is_the_teachers_point():
    # t = 0.75: x = 0.25 · 1 + 0.75 · 3 = 2.5 and the teacher's 2.5 - 0.25 · 5 = 1.25 at t' = s = 0.5;
    # the student's 2.5 - 0.25 · (2.5 weight + 0.75).
    for weight in (1.0, -7.0):
        (loss,) = losses(TWO_SEGMENTS, AT_0_75, roles=LinearRoles(weight))
        assert loss.item() == pytest.approx((2.5 - 0.25 * (2.5 * weight + 0.75) - 1.25) ** 2 / 0.25**2)


def test_at_the_end_of_the_path_latent_consistencys_target_is_the_teachers_picture():
    # t = 0.25: x = 1.5, the teacher's picture 1.5 - 0.25 · 3 = 0.75; the student's 1.5 - 0.25 · (1.5 weight + 0.25).
    for weight in (1.0, -7.0):
        error = 1.5 - 0.25 * (1.5 * weight + 0.25) - 0.75
        (loss,) = losses(ONE_SEGMENT, AT_0_25, roles=LinearRoles(weight))
        assert loss.item() == pytest.approx(error**2 / 0.25**2)


def test_no_gradient_reaches_target_or_teacher():
    roles = LinearRoles()
    losses(TWO_SEGMENTS, AT_1, roles=roles).sum().backward()
    assert roles.seen == [(TEACHER, [1], False, False), (STUDENT, [0.75], False, False), (STUDENT, [1], True, True)]
    assert roles.weight.grad.item() == pytest.approx(2 * (1 - 0.9375) * (0.5 - 1) * 3 / 0.5**2)


@pytest.mark.parametrize("task", [TWO_SEGMENTS, ONE_SEGMENT])
def test_each_sample_of_a_batch_has_its_own_noise_level(task):
    together = losses(task, AT_1, AT_0_75, AT_0_5, AT_0_25)
    torch.testing.assert_close(together, torch.cat([losses(task, u) for u in (AT_1, AT_0_75, AT_0_5, AT_0_25)]))
    assert len(set(together.tolist())) > 2


def test_segments_shrink_with_the_run():
    task = HyperSD(student=Student(num_inference_steps=2), segments=[8, 4, 2])
    assert [task.segments_at(TrainProgress(step, 9)) for step in range(9)] == [8, 8, 8, 4, 4, 4, 2, 2, 2]
    assert [task.segments_at(TrainProgress(step, 2)) for step in (0, 1, 2)] == [8, 4, 2]
    assert task.segments_at(None) == 2


def test_where_segments_are_shorter_jumps_are_too():
    # Of four segments the first ends at 0.75: the target is the teacher's 1.5, the student's 3 - 0.25 · (3 + 1).
    assert losses(TWO_SEGMENTS, AT_1, progress=TrainProgress(4, 10)).item() == pytest.approx((2 - 1.5) ** 2 / 0.25**2)
    assert losses(TWO_SEGMENTS, AT_1, progress=TrainProgress(5, 10)).item() == losses(TWO_SEGMENTS, AT_1).item()


def test_the_students_own_noise_levels_are_the_last_edges():
    student = Student(num_inference_steps=2, sigmas=[1, 0.875])
    task = HyperSD(student=student, segments=[4, 2])
    assert task.edges(LinearPipe(), SIZE, None) == [1, 0.875, 0]
    assert task.edges(LinearPipe(), SIZE, TrainProgress(0, 9)) == [1, 0.75, 0.5, 0.25, 0]


LEVELS = st.floats(2**-10, 1, width=32)


@given(
    st.one_of(st.integers(1, 60).map(qwen_image_sigmas), st.lists(LEVELS, min_size=1).map(torch.tensor)),
    st.one_of(st.integers(1, 20).map(qwen_image_sigmas), st.lists(LEVELS).map(torch.tensor)),
    st.integers(1, 64),
)
def test_no_step_of_the_teacher_crosses_an_edge(grid, edges, count):
    edges = [*edges.tolist(), 0.0]
    for start, following, end in zip(*spans_at(torch.arange(count) / count, grid.tolist(), edges), strict=True):
        assert start > following >= end and end in edges
        assert not any(following < edge < start for edge in edges) and not any(end < edge < start for edge in edges)


@given(st.integers(1, 60), st.integers(1, 20))
def test_each_noise_level_that_the_student_samples_at_is_trained(steps, segments):
    levels, edges = qwen_image_sigmas(steps), qwen_image_sigmas(segments)
    starts = spans_at(torch.arange(1000) / 1000, levels.tolist(), [*edges.tolist(), 0.0]).start
    assert torch.isin(edges, starts).all() and torch.isin(levels, starts).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"segments": [8, 2]},
            r"task.segments is \[8, 2\]; expected decreasing numbers .*_steps, which is 4",
        ),
        ({"segments": [4, 8, 4]}, r"task.segments is \[4, 8, 4\]"),
        ({"segments": []}, r"task.segments is \[\]"),
        ({"grid_steps": 7}, "task.grid_steps is 7; expected at least 8"),
    ],
)
def test_segments_that_lead_nowhere_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HyperSD(**settings)


def test_a_grid_of_no_step_is_refused():
    with pytest.raises(ValueError, match="task.grid_steps is 0; expected at least 1"):
        LatentConsistency(grid_steps=0)


# The real pipeline ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[HyperSD(teacher=None, guidance=3), LatentConsistency(teacher=None, guidance=3)])
def module(request, training_module):
    """A student that is not its teacher any more."""
    module = training_module(request.param, LoRA(rank=2, target_modules=["to_q", "to_v"]))
    for name, parameter in module.pipe.dit.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    return module


def predict(module, latents, sigma, inputs, adapted: bool) -> torch.Tensor:
    """The pipeline's velocity, its adapter switched by hand."""
    layers = [layer for layer in module.pipe.dit.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(adapted)
    try:
        return module.pipe.predict(sigma * 1000, **{**inputs, "latents": latents})
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def jumps(module, edges, context: LossContext) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's jump from where the teacher's step leads, and from x_t, of one sample; both over t - s."""
    levels = torch.cat([qwen_image_sigmas(module.task.grid_steps, dynamic_shift_len=6), *edges]).unique().tolist()
    index = 1 + int(context.rng.uniform("timestep") * (len(levels) - 1))
    t, after = torch.tensor([levels[index]]), torch.tensor([levels[index - 1]])
    s = max(edge for edge in torch.cat(edges) if edge < t)
    x = (1 - t) * context.clean + t * context.rng.normal("noise", context.clean)
    posi = predict(module, x, t, context.inputs, adapted=False)
    nega = predict(module, x, t, {**context.inputs, **context.negative}, adapted=False)
    guided = pack_latents(nega + module.task.guidance * (posi - nega))
    guided = guided * pack_latents(posi).norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
    point = x + (after - t) * unpack_latents(guided, *x.shape[-2:])
    target = point + (s - after) * predict(module, point, after, context.inputs, adapted=True)
    return target / (t - s), (x + (s - t) * predict(module, x, t, context.inputs, adapted=True)) / (t - s)


@pytest.mark.parametrize("epoch", range(3))  # each at another noise level
def test_with_a_network_it_is_what_is_written_out(module, samples, epoch, monkeypatch):
    loss, seen = Consistency.loss, []
    monkeypatch.setattr(Consistency, "loss", lambda task, context: seen.append(context) or loss(task, context))
    (found,) = module([samples[1]._replace(epoch=epoch)])
    edges = [] if isinstance(module.task, LatentConsistency) else [qwen_image_sigmas(4, dynamic_shift_len=6)]
    error = torch.sub(*jumps(module, [*edges, torch.zeros(1)], *seen))
    torch.testing.assert_close(found, error.pow(2).mean(), atol=1e-6, rtol=1e-3)


def test_only_the_adapter_learns(module, samples):
    module(samples).sum().backward()
    learning = {name for name, parameter in module.pipe.named_parameters() if parameter.grad is not None}
    assert learning and all("lora_" in name for name in learning)


def test_a_batch_is_what_its_samples_are_alone(module, samples):
    together, alone = module(samples), torch.cat([module([sample]) for sample in samples])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
