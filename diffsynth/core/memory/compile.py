"""Regional compilation: torch.compile of a network's repeated blocks, which share the compiled graphs."""

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ..gradient import repeated_blocks

logger = logging.getLogger(__name__)

BACKEND = "inductor"
OLDEST = (2, 7)  # before it, the number of graphs of a block could not be limited as here
# Most graphs of one class of blocks; beyond them torch runs the block uncompiled. 2⁴ cases need a graph each: the first
# block, whose inputs need no gradient, or another one; training or validation; one sample or several; one size or any.
VARIANTS = 16


def compilable_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of a diffusers network whose classes it names for regional compilation (`_repeated_blocks`)."""
    names = getattr(network, "_repeated_blocks", None) or ()
    return [block for block in repeated_blocks(network) if type(block).__name__ in names]


def check_compilable(network: nn.Module) -> None:
    """Check that a network has blocks to compile, and that this torch can compile them.

    Raises:
        ValueError: The network names no repeated blocks, or torch is too old.
    """
    if torch.__version__ < OLDEST:
        raise ValueError(
            f"memory.compile=blocks needs torch {'.'.join(map(str, OLDEST))} or newer, and this is "
            f"{torch.__version__}; install a newer one, or set memory.compile=none."
        )
    if not compilable_blocks(network):
        raise ValueError(
            f"{type(network).__name__} names no repeated blocks (_repeated_blocks), and only those are compiled; set "
            "memory.compile=none."
        )


def compile_blocks(network: nn.Module) -> "CountedBackend | None":
    """Compile a network's repeated blocks in place; the names of parameters stay as they are.

    Call it after adapters are injected. Sizes that change become symbols of the graph, so that all resolutions and
    prompt lengths share one graph. Returns None, and compiles nothing, if parameters are meta or fake tensors (a plan).
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
    """A torch.compile backend that logs each compilation, and warns once when there are more than `limit`."""

    def __init__(self):
        self.count, self.limit = 0, VARIANTS
        self.compile = torch._dynamo.lookup_backend(BACKEND)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable:
        began = time.perf_counter()
        compiled = self.compile(graph, inputs)
        self.count += 1
        logger.info("Compiled a block, graph %d, in %.0f s.", self.count, time.perf_counter() - began)
        if self.count == self.limit + 1:
            logger.warning(
                "The blocks were compiled %d times, and still no graph fits some inputs; memory.compile=none may be "
                "faster here.",
                self.count,
            )
        return compiled
