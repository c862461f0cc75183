"""Roles of a distillation on one base: who predicts, with which weights, and where gradients go."""

import pytest
import torch
from torch import Tensor

from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.distillation.roles import FAKE_SCORE, RANK_BESIDE_FULL, STUDENT, TEACHER, FakeScore, Roles
from diffsynth.diffusion.loss import FlowMatchSFT, RoleDistillation
from diffsynth.diffusion.trained import MODEL

LORA = LoRA(rank=2, target_modules=["to_q", "to_k"])
FULL = ["dit"]


class Played(RoleDistillation):
    """Trains the student towards its teacher."""


def base_and_roles(training_module, lora, fake_score=None, **options):
    """What the base predicts, a module that has a teacher and a fake score, and what both are asked."""
    task = FlowMatchSFT(trainable_models=None if lora else FULL)
    module = training_module(task, lora, **options)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 4, 4, generator=generator)
    text = torch.randn(2, 5, module.pipe.dit.config.joint_attention_dim, generator=generator)
    inputs = {"prompt_emb": text, "prompt_emb_mask": torch.ones(2, 5, dtype=torch.bool), **module.memory.inputs}
    asked = (latents, torch.tensor([0.3, 0.9]), inputs)
    with torch.no_grad():
        base = module.pipe.predict(asked[1] * 1000, latents=latents, **inputs)
    return base, Roles(module.pipe, lora, fake_score), module, asked


def shake(parameters) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def named(module, roles) -> dict:
    found = {
        **dict(module.named_parameters()),
        **{f"role_networks.{n}": p for n, p in roles.networks.named_parameters()},
    }
    return {name: p for name, p in found.items() if p.requires_grad}


def part(module, roles, role: str) -> list[Tensor]:
    return list(roles.partition(named(module, roles))[MODEL if role == STUDENT else role].values())


KINDS = [(LORA, FakeScore()), (LORA, FakeScore(full=True)), (None, FakeScore()), (None, FakeScore(full=True))]
IDS = ["adapters", "full fake", "full student", "both full"]


@pytest.mark.parametrize(("lora", "fake_score"), KINDS, ids=IDS)
def test_each_role_predicts_with_its_own_weights_and_the_teacher_with_the_bases(training_module, lora, fake_score):
    base, roles, module, asked = base_and_roles(training_module, lora, fake_score)
    for role in (STUDENT, TEACHER, FAKE_SCORE):  # all begin as the base
        torch.testing.assert_close(roles.velocity(role, *asked), base, atol=1e-5, rtol=1e-5)
    for changed, other in ((STUDENT, FAKE_SCORE), (FAKE_SCORE, STUDENT)):
        before = roles.velocity(other, *asked).detach()
        shake(part(module, roles, changed))
        assert (roles.velocity(changed, *asked) - base).abs().max() > 1e-3
        assert torch.equal(roles.velocity(other, *asked), before)
        torch.testing.assert_close(roles.velocity(TEACHER, *asked), base, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("lora", "fake_score"), KINDS, ids=IDS)
def test_gradients_reach_the_role_that_is_trained_and_the_inputs_of_all(training_module, lora, fake_score):
    _, roles, module, (latents, sigma, inputs) = base_and_roles(training_module, lora, fake_score)
    parameters = named(module, roles)
    for role in (STUDENT, FAKE_SCORE):
        shake(part(module, roles, role))
    for role in (STUDENT, TEACHER, FAKE_SCORE):
        for trained in {False, role != TEACHER}:
            seen = latents.clone().requires_grad_(True)
            roles.velocity(role, seen, sigma, inputs, trained=trained).pow(2).sum().backward()
            reached = {name for name, p in parameters.items() if p.grad is not None and p.grad.abs().sum() > 0}
            own = {n for n, p in parameters.items() if trained and any(p is q for q in part(module, roles, role))}
            assert (reached == set()) if not trained else (reached and reached <= own)
            assert seen.grad.abs().sum() > 0
            for parameter in parameters.values():
                parameter.grad = None
    assert named(module, roles).keys() == parameters.keys()  # the flags are as they were


def test_outside_of_roles_the_pipeline_samples_as_the_student(training_module):
    _, roles, module, asked = base_and_roles(training_module, LORA, FakeScore())
    shake(part(module, roles, STUDENT))
    shake(part(module, roles, FAKE_SCORE))
    student = module.pipe.predict(asked[1] * 1000, latents=asked[0], **asked[2])
    torch.testing.assert_close(roles.velocity(STUDENT, *asked), student)
    with roles.active(TEACHER), roles.active(FAKE_SCORE):
        pass
    with pytest.raises(RuntimeError), roles.active(TEACHER):
        raise RuntimeError
    torch.testing.assert_close(module.pipe.predict(asked[1] * 1000, latents=asked[0], **asked[2]), student)
    (tensors, _) = module.export_weights()["lora"]
    tensors = [name for name in tensors if not name.endswith(".alpha")]
    assert len(tensors) == len(part(module, roles, STUDENT)) and not any(FAKE_SCORE in name for name in tensors)


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapters", "full student"])
def test_what_is_recomputed_in_the_backward_pass_is_recomputed_as_the_same_role(training_module, lora):
    """The backward pass is called with the student at rest; the fake score's blocks must not run as the student's."""
    found = []
    for checkpointing in ("none", "blocks"):
        options = {"checkpointing": checkpointing}
        _, roles, module, (latents, sigma, inputs) = base_and_roles(training_module, lora, FakeScore(), **options)
        for role in (STUDENT, FAKE_SCORE):
            shake(part(module, roles, role))
        module.pipe.dit.train()
        seen = latents.clone().requires_grad_(True)
        trained = roles.velocity(FAKE_SCORE, seen, sigma, inputs, trained=True)
        judged = roles.velocity(TEACHER, trained, sigma, inputs)
        roles.velocity(STUDENT, judged, sigma, inputs, trained=True).pow(2).sum().backward()
        own = [*part(module, roles, FAKE_SCORE), *part(module, roles, STUDENT)]
        found.append([seen.grad, *(p.grad for p in own if p.grad is not None)])
    for with_memory, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, with_memory, atol=1e-5, rtol=1e-4)


def test_guidance_leads_away_from_the_negative_inputs(training_module):
    _, roles, module, (latents, sigma, inputs) = base_and_roles(training_module, LORA)
    negative = {"prompt_emb": torch.zeros(2, 5, inputs["prompt_emb"].shape[-1]), "cfg_rescale": False}
    inputs = {**inputs, "cfg_rescale": False}
    guided = roles.velocity(TEACHER, latents, sigma, inputs, negative, guidance=3.0)
    posi = roles.velocity(TEACHER, latents, sigma, inputs)
    nega = roles.velocity(TEACHER, latents, sigma, {**inputs, **negative})
    expected = module.pipe.guided_velocity(
        sigma * 1000, 3.0, {}, {**inputs, "latents": latents}, {**inputs, **negative, "latents": latents}
    )
    torch.testing.assert_close(guided, expected)
    assert (guided - posi).abs().max() > 1e-4 and (posi - nega).abs().max() > 1e-4


def test_the_fake_score_is_as_large_as_the_student_unless_said(training_module):
    def rank(lora, fake_score):
        _, roles, module, _ = base_and_roles(training_module, lora, fake_score)
        return {p.shape[0] for n, p in roles.partition(named(module, roles))[FAKE_SCORE].items() if "lora_A" in n}

    assert rank(LORA, FakeScore()) == {2}
    assert rank(LORA, FakeScore(rank=3)) == {3}
    assert rank(None, FakeScore()) == {RANK_BESIDE_FULL}


def test_one_base_is_one_set_of_weights(training_module):
    """Adapters alone come on top of the student's; a student in full costs one frozen copy."""
    _, roles, module, _ = base_and_roles(training_module, LORA, FakeScore())
    assert list(roles.networks) == []
    _, roles, module, _ = base_and_roles(training_module, None, FakeScore())
    assert list(roles.networks) == [TEACHER]
    base = sum(p.numel() for p in module.pipe.dit.parameters())
    copied = sum(p.numel() for n, p in roles.networks.named_parameters() if FAKE_SCORE not in n)
    assert copied == base
