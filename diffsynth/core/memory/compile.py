"""Regional compilation: the blocks that a network repeats are compiled, once for all of them, not the network."""

import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ..gradient import repeated_blocks

logger = logging.getLogger(__name__)

BACKEND = "inductor"
OLDEST = (2, 7)  # before it, the number of graphs of a block could not be limited as here
# Of one block: the first (no gradient reaches its inputs) and the others, in training and in validation, of one sample
# and of several, of one size and of any. A graph each; past them torch runs the block uncompiled.
VARIANTS = 16


def compilable_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks that a diffusers model names as those to be compiled (`_repeated_blocks`)."""
    names = getattr(network, "_repeated_blocks", None) or ()
    return [block for block in repeated_blocks(network) if type(block).__name__ in names]


def check_compilable(network: nn.Module) -> None:
    """Refuse a network that names no blocks that it repeats, and a torch that cannot compile them.

    Raises:
        ValueError: Names the network, or the version.
    """
    if torch.__version__ < OLDEST:
        raise ValueError(
            f"memory.compile=blocks needs torch {'.'.join(map(str, OLDEST))} or newer, and this is "
            f"{torch.__version__}; install a newer one, or set memory.compile=none."
        )
    if not compilable_blocks(network):
        raise ValueError(
            f"{type(network).__name__} says of no block that it repeats it (_repeated_blocks), and only those are "
            "compiled; set memory.compile=none."
        )


def compile_blocks(network: nn.Module) -> "CountedBackend | None":
    """Compile a network's repeated blocks where they stand, which leaves all names of parameters as they are.

    Sizes that change become symbols of the graph, so that resolutions and lengths of prompts share one. It comes after
    adapters are injected. Tensors without numbers, of which a plan is made, are left to run as they are: None.
    """
    if any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in network.parameters()):
        return None
    blocks, backend = compilable_blocks(network), CountedBackend()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for block in blocks:
        block.compile(backend=backend)
    backend.limit = VARIANTS * len({type(block) for block in blocks})
    return backend


class CountedBackend:
    """A compiler that says in the log how often it was called, and warns when that is too often."""

    def __init__(self):
        self.count, self.limit = 0, VARIANTS
        self.compile = torch._dynamo.lookup_backend(BACKEND)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor]):
        began = time.perf_counter()
        compiled = self.compile(graph, inputs)
        self.count += 1
        logger.info("Compiled a block, graph %d, in %.0f s.", self.count, time.perf_counter() - began)
        if self.count == self.limit + 1:
            logger.warning(
                "The blocks were compiled %d times and still meet inputs that no graph is for; memory.compile=none "
                "may be faster here.",
                self.count,
            )
        return compiled
