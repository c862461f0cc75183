"""Distribution matching: its gradient, what the student is trained on, who is trained when, that no mode is lost."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import toy
from torch import Tensor

from diffsynth.core.data import SampleAddress
from diffsynth.diffusion.distillation.context import LossContext
from diffsynth.diffusion.distillation.roles import FAKE_SCORE, FakeScore
from diffsynth.diffusion.distillation.settings import Student
from diffsynth.diffusion.logger import ModelLogger
from diffsynth.diffusion.loss import DMD2
from diffsynth.diffusion.loss.dmd2 import matching_gradient
from diffsynth.diffusion.randomness import GlobalRNG, SampleRNG
from diffsynth.diffusion.trained import MODEL, TrainProgress
from diffsynth.diffusion.training_module import DiffusionTrainingModule
from diffsynth.training.accelerator import make_accelerator
from diffsynth.training.loop import launch_training_task

TOY = DMD2(guidance=1, fake_score=FakeScore(full=True), student=Student(num_inference_steps=2, renoise=True))
STUDENT_STEP, FAKE_STEP = TrainProgress(0, 10), TrainProgress(1, 10)


class ToyTraining(DiffusionTrainingModule):
    """The toy with an objective, in the loop that trains everything else."""

    def __init__(self, task: DMD2):
        super().__init__()
        self.pipe, self.task = toy.ToyPipeline(), task
        self.roles = task.build_roles(self.pipe, None, seed=0)
        self.role_networks = self.roles.networks

    def trained_parts(self):
        return self.roles.partition(super().trained_parts()[MODEL])

    def trained_at(self, step):
        return self.task.trained_at(step)

    def learning_rate(self, part):
        return self.task.learning_rate(part)

    def forward(self, data, progress: TrainProgress, count: int = 1) -> Tensor:
        rng = SampleRNG(0, [SampleAddress(progress.step, 1000 * data + n) for n in range(count)])
        return self.loss(rng, count, progress)

    def loss(self, rng, count: int, progress) -> Tensor:
        sides = {"roles": self.roles, "negative": {}, "progress": progress}
        return self.task(self.pipe, rng=rng, input_latents=torch.zeros(count, 2, 1, 1), height=1, width=1, **sides)


def an_rng(count: int = 4) -> SampleRNG:
    return SampleRNG(3, [SampleAddress(0, n) for n in range(count)])


def sampled_by(module: ToyTraining, rng: SampleRNG, count: int = 4) -> Tensor:
    """Points (count, 2) that the student is trained on."""
    about = {"roles": module.roles, "progress": None, "size": {"height": 1, "width": 1}, "inputs": {}, "negative": {}}
    context = LossContext(pipe=module.pipe, rng=rng, clean=torch.zeros(count, 2, 1, 1), **about)
    return module.task.sample_as_student(context)[..., 0, 0]


def shaken(task: DMD2 = TOY) -> ToyTraining:
    """A toy whose student and fake score have left the teacher."""
    module = ToyTraining(task)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in module.trained_parts().values():
            for parameter in part.values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module


def test_the_gradient_is_the_papers():
    sampled = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    teacher = torch.tensor([[0.0, 1.0], [2.0, -4.0]])  # 1 and 2 away: 1.5 in the mean; 2 and 4: 3
    fake = torch.tensor([[3.0, 4.0], [2.0, 2.0]])
    expected = torch.tensor([[3.0 / 1.5, 3.0 / 1.5], [0.0, 6.0 / 3.0]])
    torch.testing.assert_close(matching_gradient(sampled, teacher, fake), expected)


def test_the_loss_hands_that_gradient_to_what_the_student_samples(monkeypatch):
    module, seen = shaken(), {}
    own = DMD2.sample_as_student

    def sampled(*args):
        seen["sampled"] = own(*args)
        seen["sampled"].retain_grad()
        return seen["sampled"]

    monkeypatch.setattr(DMD2, "sample_as_student", sampled)
    module.loss(an_rng(), 4, STUDENT_STEP).sum().backward()
    x = seen["sampled"].detach()
    sigma = (0.02 + 0.96 * an_rng().uniform("matching"))[:, None]
    noisy = (1 - sigma) * x[..., 0, 0] + sigma * an_rng().normal("matching noise", x)[..., 0, 0]
    teacher = noisy - sigma * toy.mixture_velocity(noisy, sigma[:, 0])
    fake = noisy - sigma * module.roles.networks[FAKE_SCORE](noisy, sigma[:, 0])
    gradient = (fake - teacher) / (x[..., 0, 0] - teacher).abs().mean(1, keepdim=True)
    torch.testing.assert_close(seen["sampled"].grad[..., 0, 0], gradient.detach() / 2, atol=1e-5, rtol=1e-4)


def test_the_fake_score_learns_what_the_student_samples_by_flow_matching():
    module = shaken()
    found = module.loss(an_rng(), 4, FAKE_STEP)
    with torch.no_grad():
        x = sampled_by(module, an_rng())
        sigma, noise = (
            (0.02 + 0.96 * an_rng().uniform("matching"))[:, None],
            an_rng().normal("matching noise", x[..., None, None]),
        )
        velocity = module.roles.networks[FAKE_SCORE]((1 - sigma) * x + sigma * noise[..., 0, 0], sigma[:, 0])
    torch.testing.assert_close(found, (velocity - (noise[..., 0, 0] - x)).pow(2).mean(1))


@pytest.mark.parametrize("renoise", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_student_is_trained_on_points_that_it_comes_to_by_itself(renoise, steps):
    """Backward simulation of both kinds: the steps before the trained one are the sampler's own."""
    task = replace(TOY, student=Student(num_inference_steps=steps, renoise=renoise))
    module, rng, like = shaken(task), an_rng(16), torch.zeros(16, 2, 1, 1)
    sigmas = torch.linspace(1, 0, steps + 1)[:-1]
    found = sampled_by(module, rng, 16)
    last = (rng.uniform("student step") * steps).long()
    assert set(last.tolist()) == set(range(steps))
    x = rng.normal("noise", like)[..., 0, 0]
    clean = torch.zeros_like(x)
    for step, sigma in enumerate(sigmas):
        estimate = x - sigma * module.pipe.dit(x, sigma.expand(16))
        clean = torch.where((last == step)[:, None], estimate, clean)
        if step + 1 < steps:
            following = sigmas[step + 1]
            noise = rng.normal(f"renoise {step}", like)[..., 0, 0] if renoise else (x - (1 - sigma) * estimate) / sigma
            x = (1 - following) * estimate + following * noise
    torch.testing.assert_close(found, clean, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("progress", [STUDENT_STEP, FAKE_STEP, None])
def test_a_batch_has_the_losses_of_its_samples(progress):
    module = shaken()
    together = module.loss(an_rng(), 4, progress)
    alone = [module.loss(SampleRNG(3, [SampleAddress(0, n)]), 1, progress) for n in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_each_step_reaches_its_own_part_and_nothing_else():
    module = shaken()
    for progress, trained in ((STUDENT_STEP, MODEL), (FAKE_STEP, FAKE_SCORE)):
        module.zero_grad()
        module.loss(an_rng(), 4, progress).mean().backward()
        reached = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert reached == set(module.trained_parts()[trained])


@pytest.mark.parametrize("accumulation", [1, 2, 4, 5])
def test_the_student_steps_as_often_as_configured_however_many_micro_batches_a_step_has(accumulation, tmp_path):
    module = ToyTraining(replace(TOY, student_every=5))
    stepped, steps = {part: [] for part in (MODEL, FAKE_SCORE)}, []
    module.register_forward_pre_hook(
        lambda module, args, kwargs: steps.append(kwargs["progress"].step), with_kwargs=True
    )

    class Counted(torch.optim.SGD):
        def step(self, closure=None):
            own = {id(p) for group in self.param_groups for p in group["params"]}
            parts = {name: {id(p) for p in part.values()} for name, part in module.trained_parts().items()}
            stepped[next(name for name, part in parts.items() if part == own)].append(steps[-1])
            return super().step(closure)

    launch_training_task(
        make_accelerator("cpu", "float32"),
        list(range(100)),
        module,
        ModelLogger(tmp_path),
        max_steps=11,
        batch_size=accumulation,
        micro_batch_size=1,
        optimizer=partial(Counted, lr=1e-3),
    )
    assert stepped[MODEL] == [0, 5, 10]
    assert stepped[FAKE_SCORE] == [1, 2, 3, 4, 6, 7, 8, 9]


def test_two_gaussians_keep_both_modes():
    """A student of two steps, a fake score and a teacher that knows the truth: all lands near one of two modes."""
    torch.manual_seed(0)
    task = replace(TOY, student_every=3, student=Student(num_inference_steps=2))
    module = ToyTraining(task)
    rates = {MODEL: 5e-3, FAKE_SCORE: 1e-2}
    adams = {n: torch.optim.Adam(p.values(), lr=rates[n]) for n, p in module.trained_parts().items()}
    before = module.pipe.points(1000, task.student.settings)
    for step in range(800):
        (part,) = task.trained_at(step)
        adams[part].zero_grad()
        module.loss(GlobalRNG(128), 128, TrainProgress(step, 800)).mean().backward()
        adams[part].step()
    after = module.pipe.points(1000, task.student.settings)
    off, share = spread(after)
    # Points of the mixture itself are off by 0.28; of five seeds, students by 0.38 to 0.45, shares of 0.48 to 0.56.
    assert spread(before)[0] > 0.8 and off < 0.55
    assert 0.35 < share < 0.65


def spread(points: Tensor) -> tuple[float, float]:
    """Root mean square distance of points to their nearest mode, and the share of them at the first."""
    distances = torch.cdist(points, toy.MODES)
    return distances.min(1).values.pow(2).mean().sqrt().item(), (distances.argmin(1) == 0).float().mean().item()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_every": 1}, "student_every is 1; expected at least 2"),
        ({"min_sigma": 0.9, "max_sigma": 0.2}, "expected 0 < min < max <= 1"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DMD2(**options)
