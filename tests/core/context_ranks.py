"""Predictions and gradients of networks whose tokens are split across ranks, against those of one process."""

import copy
import json
from pathlib import Path

import torch
from bases import Base, Flux1Base, Flux2Base, GivenFrameBase, WanBase, load, some
from torch import Tensor

from diffsynth.core.context_parallel import Devices, split_tokens
from diffsynth.core.live_bytes import LiveBytes
from diffsynth.plan.first_device import FirstOf

BASES = {"qwen": Base, "flux2": Flux2Base, "flux1": Flux1Base, "wan": WanBase, "given frames": GivenFrameBase}
LATENTS = {"qwen": (3, 16, 6, 10), "flux2": (3, 128, 3, 5), "flux1": (3, 16, 6, 10)}


def cases(base: Base) -> dict[str, tuple[slice, dict]]:
    """The rows of the batch and further inputs; 15 tokens of a picture, 45 of a video and 9 of the text are odd."""
    one, all_ = slice(1), slice(None)
    found = {
        "alone": (one, {}),
        "padded": (all_, {}),
        "checkpointed": (all_, {"use_gradient_checkpointing": True}),
    }
    if isinstance(base, WanBase):
        return found
    return found | {
        "kv_cache": (all_, {"kv_cache": base.cache()}),
        "further text": (all_, {"extra_text_embedding": some(1, 4, base.batch["prompt_emb"].shape[2], seed=7)}),
    }


def result(base: Base, rows: slice, inputs: dict) -> dict[str, Tensor]:
    """The prediction, and gradients of weights and latents."""
    base.batch["latents"].requires_grad_(True).grad = None
    base.dit.zero_grad()
    predicted = base(rows, **inputs)
    predicted.mul(torch.linspace(-1, 1, predicted.numel()).view_as(predicted)).sum().backward()
    gradients = {name: p.grad for name, p in base.dit.named_parameters() if p.grad is not None}
    return {"prediction": predicted.detach().contiguous(), "latents": base.batch["latents"].grad, **gradients}


def averaged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Average over processes, as DDP averages gradients."""
    for tensor in tensors.values():
        torch.distributed.all_reduce(tensor)
    return {name: tensor / torch.distributed.get_world_size() for name, tensor in tensors.items()}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    pairs = [(found[name], expected[name]) for name in expected]
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() for a, b in pairs)


def peak(base: Base, rows: slice, inputs: dict) -> int:
    result(base, rows, inputs)  # the first makes tables of places
    with LiveBytes() as live:
        result(base, rows, inputs)
    return live.device.peak


def compare(folders: dict[str, Path], result_file: Path) -> None:
    """Compare each family's network with tokens split across ranks with the whole network, and write the results.

    `apart`: largest difference of predictions and gradients, relative to the largest number.
    `taken`: peak of bytes of tensors in the first process, and the peak that is planned without the other processes.
    """
    torch.distributed.init_process_group("gloo")
    apart, taken = {}, {}
    for family, folder in folders.items():
        kind = BASES[family]
        kind.latents = LATENTS.get(family, kind.latents)
        whole = load(kind, folder)
        whole.dit.requires_grad_(True)
        split = kind(copy.deepcopy(whole.dit))
        planned = kind(copy.deepcopy(whole.dit))
        split_tokens(split.dit, Devices(torch.distributed.group.WORLD))
        split_tokens(planned.dit, FirstOf(torch.distributed.get_world_size()))
        for name, (rows, inputs) in cases(whole).items():
            case = f"{family}, {name}"
            apart[case] = distance(averaged(result(split, rows, inputs)), result(whole, rows, inputs))
            if name == "padded":
                taken[family] = [peak(base, rows, inputs) for base in (split, planned)]
    if torch.distributed.get_rank() == 0:
        result_file.write_text(json.dumps({"apart": apart, "taken": taken}))
