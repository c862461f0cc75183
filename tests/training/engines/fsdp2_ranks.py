"""What the ranks of a group do under FSDP2; functions of a module, as other processes import them."""

import torch
from torch import nn

BATCHES = 3


class Network(nn.Module):
    """Two blocks and a head, as diffusers' networks have them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x).squeeze(-1)


def batches(rank: int, count: int) -> list[torch.Tensor]:
    """The micro-batches of one rank."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(4, 8, generator=generator) for _ in range(count)]


def sharded(torch_dtype: str, trainable_models: tuple[str, ...]):
    """An accelerator, an engine, and a network that the engine shards as it would for a training of these models."""
    from types import SimpleNamespace

    from diffsynth.training.accelerator import make_accelerator
    from diffsynth.training.engines.fsdp2 import FSDP2, shard_network

    accelerator = make_accelerator("cpu", torch_dtype)
    engine, network = FSDP2(accelerator), Network()
    pipe = SimpleNamespace(torch_dtype=getattr(torch, torch_dtype))
    options = engine._options(SimpleNamespace(trainable_models=trainable_models, pipe=pipe))
    engine.networks = [shard_network(network, options)]
    return accelerator, engine, network


def gather(folder: str) -> None:
    """Save the dtypes of gathered weights in full training and with an adapter, and of the weights and gradients."""
    found = {}
    for name, trainable_models in (("full", ("dit",)), ("adapter", ())):
        accelerator, _, network = sharded("bfloat16", trainable_models)
        gathered = []
        network.blocks[0].register_forward_pre_hook(lambda block, _, into=gathered: into.append(block.weight.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            network(batches(0, 1)[0]).mean().backward()
        weight = network.blocks[0].weight
        found[name] = [gathered[0], weight.dtype, weight.grad.dtype]
    if accelerator.is_main_process:
        torch.save(found, f"{folder}/dtypes.pt")
    torch.distributed.destroy_process_group()


def accumulate(folder: str) -> None:
    """Accumulate gradients over micro-batches as the engine lets it, and save what is held meanwhile and at the end."""
    from torch.distributed.tensor import DTensor

    accelerator, engine, network = sharded("float32", trainable_models=())
    held = []
    for number, batch in enumerate(batches(accelerator.process_index, BATCHES)):
        with engine.accumulating(network, last=number == BATCHES - 1):
            (network(batch).mean() / BATCHES).backward()
        held.append(sum(p.grad.to_local().numel() for p in network.parameters() if isinstance(p.grad, DTensor)))
    gradients = {name: p.grad.full_tensor() for name, p in network.named_parameters()}
    if accelerator.is_main_process:
        torch.save({"held": held, "gradients": gradients}, f"{folder}/gradients.pt")
    torch.distributed.destroy_process_group()
