"""Samples pictures of cached prompts with a pipeline that is being trained, in any of its roles."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...core.data import Row, collate
from ...diffusion.pipeline.remembered import to_device
from ...diffusion.training_module import with_made

if TYPE_CHECKING:
    from ...diffusion.base_pipeline import BasePipeline
    from ...diffusion.training_module import PipelineTrainingModule


Sample = Callable[["BasePipeline", dict, dict, dict], dict[str, Tensor]]  # of inputs (shared, positive, negative)


class Request(NamedTuple):
    """A cached prompt, and the seed of the noise that it is sampled from."""

    row: Row
    seed: int


def sample_in_batches(
    module: "PipelineTrainingModule", requests: Sequence[Request], sample: Sample, role: str, size: int
) -> dict[str, Tensor]:
    """What `sample` makes of N requests of one size, batch by batch, in fp32 on the CPU: tensors (N, …) by name.

    The tensors are not those of `torch.inference_mode`: networks keep some of what they compute, such as tables of
    positions, for the next training step, whose backward pass could not use them.

    Args:
        sample: Makes tensors (B, …) by name of a batch of inputs, such as `RewardObjective.roll_out`.
        role: The role that samples, if the training has roles.
        size: Samples per batch.
    """
    pieces = [requests[start : start + size] for start in range(0, len(requests), size)]
    batches = [_sample(module, piece, sample, role) for piece in pieces]
    return {name: torch.cat([batch[name] for batch in batches]).float().cpu() for name in batches[0]}


@torch.no_grad()
def _sample(
    module: "PipelineTrainingModule", requests: Sequence[Request], sample: Sample, role: str
) -> dict[str, Tensor]:
    pipe, (shared, posi, nega) = module.pipe, inputs_of(module, requests)
    request = {**shared, **module.task.sampling.settings}
    acting = nullcontext() if module.roles is None else module.roles.active(role)
    with pipe.sampling(), pipe.sampling_steps(request), acting:
        return sample(pipe, request, posi, nega)


def plainly(pipe: "BasePipeline", shared: dict, posi: dict, nega: dict) -> dict[str, Tensor]:
    """The clean `latents` (B, …) that the pipeline samples of a batch of inputs."""
    return {"latents": pipe.denoise(shared, posi, nega)}


def inputs_of(module: "PipelineTrainingModule", requests: Sequence[Request]) -> tuple[dict, dict, dict]:
    """The pipeline's inputs (shared, positive, negative) of a batch of requests, on its device."""
    sides = zip(*(_inputs_of(module, each) for each in requests), strict=True)
    return tuple(to_device(collate(list(side)), module.pipe.device) for side in sides)


def _inputs_of(module: "PipelineTrainingModule", request: Request) -> tuple[dict, dict, dict]:
    """The pipeline's inputs (shared, positive, negative) of a request, with its noise."""
    pipe = module.pipe
    shared, posi, nega = with_made(module.get_pipeline_inputs(request.row), request.row.made)
    shape = pipe.latents.shape(**{name: shared[name] for name in ("height", "width", "num_frames") if name in shared})
    noise = pipe.generate_noise(shape, request.seed, "cpu", pipe.torch_dtype)
    return {**shared, "seed": request.seed, "latents": noise}, posi, nega


@torch.no_grad()
def decoded(module: "PipelineTrainingModule", latents: Tensor) -> list[Any]:
    """What clean latents (N, …) show, such as images."""
    pipe = module.pipe
    with pipe.sampling():
        return [pipe.decode(each.to(pipe.device, pipe.torch_dtype), pipe.call_defaults) for each in latents.split(1)]
