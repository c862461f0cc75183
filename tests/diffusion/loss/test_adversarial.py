"""Adversarial distillation: its numbers by hand, whom its gradients reach, what a discriminator reads of a network."""

import pytest
import tiny_flux2
import torch
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from diffsynth.core.data import Sample
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.base_pipeline import BasePipeline
from diffsynth.diffusion.distillation.discriminator import (
    Discriminator,
    features,
    generator_hinge,
    generator_softplus,
    hinge_loss,
    logits,
    softplus_loss,
)
from diffsynth.diffusion.distillation.roles import DISCRIMINATOR, STUDENT, TEACHER, Roles
from diffsynth.diffusion.logger import ModelLogger
from diffsynth.diffusion.loss import TrainProgress
from diffsynth.diffusion.loss.add import AdversarialDistillation
from diffsynth.diffusion.pipeline.components import Network
from diffsynth.diffusion.pipeline.request import ImageRequest
from diffsynth.diffusion.pipeline.vae import Latents
from diffsynth.training.accelerator import make_accelerator
from diffsynth.training.loop import launch_training_task

LORA = LoRA(rank=2, target_modules=["to_q", "to_k"])
OF_DISCRIMINATOR, OF_STUDENT = TrainProgress(0, 2), TrainProgress(1, 2)  # whose step it is


# The loss by hand -----------------------------------------------------------------------------------------------------


class Scaling(nn.Module):
    """v = θ x, by way of one layer that a discriminator can read."""

    inner_dim = 1

    def __init__(self):
        super().__init__()
        self.theta, self.tokens = nn.Parameter(torch.ones(())), nn.Identity()

    def forward(self, latents):
        self.tokens(latents.flatten(1).unsqueeze(-1))
        return self.theta * latents


class ScalingPipeline(BasePipeline):
    """v = θ x + `push`, in steps from the noise levels 1 and 1/2."""

    request = ImageRequest
    components = {"dit": Network("Scaling")}
    latents = Latents(channels=1, factor=1)
    unit_classes = ()

    def __init__(self):
        super().__init__(torch_dtype=torch.float32)
        self.dit = Scaling()

    @staticmethod
    def sigma_grid(num_inference_steps, denoising_strength=1.0):
        return torch.tensor([1.0, 0.5])

    @staticmethod
    def model_fn(dit, latents, timestep, push):
        return dit(latents) + push


class Given:
    """Random numbers that are given by purpose."""

    def __init__(self, **given):
        self.given = {name.replace("_", " "): value for name, value in given.items()}

    def uniform(self, purpose):
        return torch.tensor([self.given[purpose]])

    def normal(self, purpose, like):
        return torch.tensor(self.given[purpose]).view_as(like)


def by_hand(progress):
    """The loss of the picture (1, 1) at s = 1/2, and its gradient by the student's θ = 1.

    The teacher's θ is 3, of guidance 2 away from a push of 1; a logit is half the mean of the latents.
    """
    task = AdversarialDistillation(
        discriminator=Discriminator(layers=["tokens"]),
        distillation_weight=4.0,
        guidance=2.0,
        timesteps=lambda scheduler, u: u,
        renoising=lambda scheduler, u: u,
    )
    pipe = ScalingPipeline()
    roles = task.build_roles(pipe, None, seed=0)
    roles.networks[TEACHER].theta.fill_(3.0)
    roles.heads[0] = nn.Linear(1, 1)
    roles.heads[0].load_state_dict({"weight": torch.tensor([[0.5]]), "bias": torch.zeros(1)})
    rng = Given(
        student_step=0.7, student_noise=[2.0, -2.0],
        renoising=0.25, renoising_noise=[1.0, 1.0],
        timestep=0.5, noise=[0.0, 2.0],
    )  # fmt: skip
    inputs = {"height": 1, "width": 2, "push": 0.0, "input_latents": torch.ones(1, 1, 1, 2)}
    loss = task(pipe, rng=rng, roles=roles, negative={"push": 1.0}, progress=progress, **inputs)
    loss.sum().backward()
    return loss.item(), pipe.dit.theta.grad, roles.heads[0].weight.grad


@pytest.mark.parametrize("progress", [OF_STUDENT, None])
def test_the_students_loss_is_that_of_the_paper(progress):
    # x_s = 1/2 (1, 1) + 1/2 (2, -2) = (3/2, -1/2), x̂_θ = x_s - 1/2 x_s = (3/4, -1/4).
    # Renoised, 3/4 x̂_θ + 1/4 (1, 1) = (13/16, 1/16): D = 1/2 · 7/16.
    # x_t = 1/2 x̂_θ + 1/2 (0, 2) = (3/8, 7/8), v_ψ = 3 x_t + 1 + 2 (0 - 1): x̂_ψ = x_t - 1/2 v_ψ = (5/16, 1/16).
    # λ c(t) mean ‖x̂_θ - x̂_ψ‖² = 4 · 1/2 · (49/256 + 25/256) / 2.
    loss, student, heads = by_hand(progress)
    assert loss == pytest.approx(-7 / 32 + 37 / 128)
    # d x̂_θ / dθ = -1/2 x_s; d loss / d x̂_θ = -1/2 · 3/4 / 2 + 4 · 1/2 · (x̂_θ - x̂_ψ) = (11/16, -13/16).
    assert student == pytest.approx(-3 / 4 * 11 / 16 + 1 / 4 * -13 / 16)
    assert heads is None


def test_the_discriminators_loss_is_that_of_the_paper():
    # The picture, renoised, is (1, 1): D = 1/2; max(0, 1 - 1/2) + max(0, 1 + 7/32), by weight -1 + 7/16.
    loss, student, heads = by_hand(OF_DISCRIMINATOR)
    assert loss == pytest.approx(1 / 2 + 39 / 32)
    assert heads.item() == pytest.approx(-1 + 7 / 16)
    assert student is None


def test_losses_of_logits_are_means_over_heads():
    real, fake = torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 1.0]])
    assert generator_hinge(fake).tolist() == [1.0]
    assert hinge_loss(real, fake).tolist() == [(0 + 0.5 + 0 + 2) / 2]
    log = lambda x: torch.sigmoid(x).log()  # noqa: E731
    torch.testing.assert_close(generator_softplus(fake), -log(fake).mean(1))
    torch.testing.assert_close(softplus_loss(real, fake), -(log(real) + log(-fake)).mean(1))


# Real networks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def build(training_module):
    """`build(lora)`: a training whose networks are not what they were, in the middle of it."""

    def build(lora=LORA, **options):
        task = AdversarialDistillation(discriminator=Discriminator(hidden=8), **({} if lora else FULL))
        module = training_module(task, lora, **options)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1, generator=generator)
            elif DISCRIMINATOR in name:  # logits beyond ±1, where the hinge is flat for one side alone
                parameter.data.normal_(generator=generator)
        return module

    return build


FULL = {"trainable_models": ["dit"]}


def gradients(module, *batches, progress=OF_STUDENT) -> dict[str, torch.Tensor]:
    module.zero_grad()
    torch.cat([module(batch, progress) for batch in batches]).mean().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_each_step_reaches_its_own_part_alone(build, samples, lora):
    module = build(lora)
    student, heads = (set(named) for named in module.trained_parts().values())
    assert set(gradients(module, samples, progress=OF_DISCRIMINATOR)) == heads
    reached = set(gradients(module, samples))
    assert reached <= student and (len(reached) == len(student) or lora is None)
    assert len(reached) > 0.8 * len(student)
    assert module.trained_parts().keys() == {"model", DISCRIMINATOR}
    assert [set(named) for named in module.trained_parts().values()] == [student, heads]


def test_the_teacher_of_a_student_in_full_gets_no_gradient(build, samples):
    module = build(lora=None)
    gradients(module, samples)
    assert all(p.grad is None for p in module.roles.networks[TEACHER].parameters())


@pytest.mark.parametrize("progress", [OF_DISCRIMINATOR, OF_STUDENT])
def test_a_batch_is_what_its_samples_are_alone(build, samples, progress):
    module = build()
    alone = [[sample] for sample in samples]
    with torch.no_grad():
        torch.testing.assert_close(module(samples), torch.cat([module(one) for one in alone]), atol=1e-5, rtol=1e-5)
    together = gradients(module, samples, progress=progress)
    torch.testing.assert_close(together, gradients(module, *alone, progress=progress), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("progress", [OF_DISCRIMINATOR, OF_STUDENT])
def test_checkpointing_changes_no_gradient(build, samples, progress):
    modules = (build(checkpointing=policy) for policy in ("none", "blocks"))
    plain, recomputed = (gradients(module, samples, progress=progress) for module in modules)
    torch.testing.assert_close(recomputed, plain, atol=1e-7, rtol=1e-4)


def test_training_changes_both_parts_and_nothing_else(build, rows, tmp_path):
    module = build()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    student, heads = (set(named) for named in module.trained_parts().values())

    def changed_by(steps: int) -> set[str]:
        logger = ModelLogger(tmp_path / str(steps))
        launch_training_task(
            make_accelerator("cpu", "float32"), rows, module, logger,
            max_steps=steps, micro_batch_size=3, learning_rate=1e-3, weight_decay=0.0,
        )  # fmt: skip
        assert [path.name for path in logger.saved] == [f"epoch-{n}.safetensors" for n in range(steps)]
        return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}

    first = changed_by(1)
    assert first and first <= heads
    assert changed_by(5) == student | heads


# What it reads --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["joint blocks", "joint and single blocks"])
def asked(request, pipe):
    """A pipeline, noisy latents for it, other inputs; its blocks are of (text, image), or some of one sequence."""
    torch.manual_seed(0)
    latents = torch.randn(2, 16, 4, 6)
    mask = {"prompt_emb_mask": torch.ones(2, 5, dtype=torch.bool)}
    if request.param != "joint blocks":
        pipe, latents, mask = tiny_flux2.pipeline(), torch.randn(2, 128, 2, 3), {}
        pipe.load_models(["dit"])
    pipe.dit.requires_grad_(False).train()  # blocks are checkpointed in training mode alone
    return pipe, latents, {"prompt_emb": torch.randn(2, 5, pipe.dit.config.joint_attention_dim), **mask}


def test_three_blocks_are_read_whose_tokens_the_network_puts_out(asked):
    pipe, latents, inputs = asked
    layers = Discriminator().heads(pipe.dit, 0).layers
    with features(pipe.dit, layers) as found, torch.no_grad():
        pipe.predict(torch.tensor([300.0, 900.0]), latents=latents, **inputs)
    single = {"single_transformer_blocks"} & {name.split(".")[0] for name in layers}
    assert len(layers) == 3 and bool(single) == hasattr(pipe.dit, "single_transformer_blocks")
    for name in layers:  # 2 x 3 image tokens, and 5 of the text where both are one sequence
        assert found[name].shape == (2, 11 if "single" in name else 6, pipe.dit.inner_dim)


def test_logits_reach_the_latents_or_the_heads_whether_recomputed_or_not(asked):
    pipe, latents, inputs = asked
    roles = Roles(pipe, None, heads=Discriminator(hidden=8).heads(pipe.dit, 0))
    found = []
    for checkpointing in (False, True):
        for trained in (False, True):
            seen = latents.clone().requires_grad_(True)
            options = {**inputs, "use_gradient_checkpointing": checkpointing}
            made = logits(roles, TEACHER, seen, torch.tensor([0.3, 0.9]), options, trained)
            made.pow(2).sum().backward()
            assert made.shape == (2, 3) and made.std() > 0
            assert (seen.grad is None) == trained and all((p.grad is None) != trained for p in roles.heads.parameters())
            found.append(torch.cat([p.grad.flatten() for p in ((roles.heads.parameters()) if trained else (seen,))]))
            roles.heads.zero_grad()
    torch.testing.assert_close(found[2:], found[:2], atol=1e-7, rtol=1e-4)
    assert all(gradient.abs().sum() > 0 for gradient in found)


def test_nothing_stays_behind_in_the_network(asked):
    pipe, latents, inputs = asked
    hooks = [dict(module._forward_hooks) for module in pipe.dit.modules()]
    heads = Discriminator().heads(pipe.dit, 0)
    with pytest.raises(RuntimeError), features(pipe.dit, heads.layers):
        raise RuntimeError
    logits(Roles(pipe, None, heads=heads), STUDENT, latents, torch.tensor([0.3, 0.9]), inputs)
    assert [dict(module._forward_hooks) for module in pipe.dit.modules()] == hooks


def test_features_are_those_of_the_first_pass_though_it_is_recomputed_inside(asked):
    pipe, latents, inputs = asked
    latents.requires_grad_(True)
    layers = Discriminator().heads(pipe.dit, 0).layers
    with features(pipe.dit, layers) as found, set_checkpoint_early_stop(False):
        pipe.predict(torch.tensor([300.0, 900.0]), latents=latents, use_gradient_checkpointing=True, **inputs)
        before = dict(found)
        found[layers[-1]].sum().backward()
    assert all(found[name] is before[name] for name in layers)


def test_heads_learn_at_their_own_rate():
    assert AdversarialDistillation().learning_rate(DISCRIMINATOR) is None
    task = AdversarialDistillation(discriminator=Discriminator(learning_rate=3.0))
    assert task.learning_rate(DISCRIMINATOR) == 3.0 and task.learning_rate("model") is None


def test_heads_are_the_same_for_the_same_seed_and_leave_the_generator_alone(pipe):
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first, again, other = (Discriminator().heads(pipe.dit, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)


def test_a_layer_that_cannot_be_read_is_named(training_module, rows, pipe):
    def trained_on(layer):
        task = AdversarialDistillation(discriminator=Discriminator(layers=[layer]))
        return training_module(task, LORA)([Sample(rows[0], 0, 0)])

    nearest = "has no layer 'transformer_blocks.7'; did you mean transformer_blocks.3 or "
    with pytest.raises(ValueError, match="QwenImageTransformer2DModel " + nearest):
        trained_on("transformer_blocks.7")
    with pytest.raises(ValueError, match=r"'proj_out' is \(1, 6, 64\), expected tokens \(B, L, 128\)"):
        trained_on("proj_out")
    with pytest.raises(ValueError, match="'transformer_blocks' is nothing"):
        trained_on("transformer_blocks")
    with pytest.raises(ValueError, match="Linear does not say which blocks it repeats; name those"):
        Discriminator().heads(nn.Linear(1, 1), 0)
    with pytest.raises(ValueError, match="Linear does not state inner_dim"):
        Discriminator(layers=[""]).heads(nn.Linear(1, 1), 0)
