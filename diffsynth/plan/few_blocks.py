"""Estimates what a network takes from rehearsals with few of its blocks, since equal blocks add equal amounts."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TypeVar

from torch import nn

from ..core.data import Row
from ..core.gradient import repeated_lists
from ..core.live_bytes import bytes_of
from ..core.memory import MemoryRecipe
from ..diffusion.memory_layout import laid_out_networks
from ..diffusion.training_module import PipelineTrainingModule
from .meta_module import copied
from .rehearsal import Rehearsal, Work, WorkingMemory, tensors_of

Estimate = TypeVar("Estimate", WorkingMemory, Work)

# Checkpointed blocks of each list in the shorter and in the longer rehearsal. At least two, because the first and the
# last block may be special.
FEW, MORE = 2, 3


class FewBlocks:
    """Does what a `Rehearsal` does, faster and approximately, for memory options without streaming.

    The peak of a phase is linear in the number of blocks as long as it is at the same moment of the phase. If that
    moment changes between few blocks and all, the estimate is a little too low; therefore a rehearsal of the full
    network decides in the end.
    """

    def __init__(self, module: PipelineTrainingModule, recipe: MemoryRecipe, cp_size: int = 1, on_cuda: bool = False):
        self.module, self.recipe, self.cp_size, self.on_cuda = module, recipe, cp_size, on_cuda
        self.at_rest = bytes_of(tensors_of(module))
        self.lists = {name: blocks for name, blocks in block_lists(module).items() if self.is_long(blocks)}

    @property
    def is_whole(self) -> bool:
        """Whether no list of blocks is shortened, so that this is a rehearsal of the full network."""
        return not self.lists

    def is_long(self, blocks: nn.ModuleList) -> bool:
        """Whether rehearsing with few and with more of these blocks is faster than with all of them."""
        return len(blocks) > self.count(FEW, blocks) + self.count(MORE, blocks)

    def count(self, checkpointed: int, blocks: nn.ModuleList) -> int:
        """Length of a list that has `checkpointed` checkpointed blocks and the same remainder as the full list."""
        every = self.recipe.checkpoint_every
        return checkpointed * every + len(blocks) % every

    @cached_property
    def few(self) -> Rehearsal:
        """The rehearsal in which all lists are short."""
        return self._rehearsal()

    @cached_property
    def more(self) -> dict[str, Rehearsal]:
        """For each list, the rehearsal in which that one is longer."""
        return {name: self._rehearsal(name) for name in self.lists}

    def _rehearsal(self, longer: str | None = None) -> Rehearsal:
        counts = {n: self.count(MORE if n == longer else FEW, blocks) for n, blocks in self.lists.items()}
        return Rehearsal(copied(self.module, self.recipe, counts), self.cp_size, self.on_cuda)

    @property
    def unreached(self) -> Sequence[nn.Parameter]:
        """See `Rehearsal.unreached`; these parameters are in the network's last block, however many there are."""
        return self.few.unreached

    def train(self, rows: Sequence[Row], accumulates: bool) -> WorkingMemory:
        """See `Rehearsal.train`."""
        return self._extrapolated(lambda rehearsal: rehearsal.train(rows, accumulates))

    def evaluate(self, row: Row, count: int) -> WorkingMemory:
        """See `Rehearsal.evaluate`."""
        return self._extrapolated(lambda rehearsal: rehearsal.evaluate(row, count))

    def sample(self, request: Mapping) -> WorkingMemory:
        """See `Rehearsal.sample`."""
        return self._extrapolated(lambda rehearsal: rehearsal.sample(request))

    def roll_out(self, prompt: Row, count: int) -> WorkingMemory:
        """See `Rehearsal.roll_out`."""
        return self._extrapolated(lambda rehearsal: rehearsal.roll_out(prompt, count))

    def work(self, rows: Sequence[Row]) -> Work:
        """See `Rehearsal.work`."""
        return self._extrapolated(lambda rehearsal: rehearsal.work(rows))

    def _extrapolated(self, rehearse: Callable[[Rehearsal], Estimate]) -> Estimate:
        """Extrapolate from few and more blocks to all of them, linearly in the length of each list."""
        few = rehearse(self.few)
        estimate = few
        for name, rehearsal in self.more.items():
            blocks = self.lists[name]
            shorter, longer = self.count(FEW, blocks), self.count(MORE, blocks)
            estimate = estimate.plus((len(blocks) - shorter) / (longer - shorter), rehearse(rehearsal), few)
        return estimate


def block_lists(module: PipelineTrainingModule) -> dict[str, nn.ModuleList]:
    """Return the lists of equal blocks, by name, in the networks to which the memory options apply.

    There is none beside a template, whose outputs name blocks by their numbers.
    """
    if module.pipe.template is not None:
        return {}
    candidates = {blocks for network in laid_out_networks(module) for blocks in repeated_lists(network).values()}
    lists = {name: part for name, part in module.named_modules() if part in candidates and are_equal(part)}
    return {name: part for name, part in lists.items() if not has_discriminated_block(module, name)}


def has_discriminated_block(module: PipelineTrainingModule, name: str) -> bool:
    """Whether a discriminator reads the outputs of blocks of this list, by their numbers."""
    heads = module.roles and module.roles.heads
    return heads is not None and any(f".{name}".endswith("." + layer.rpartition(".")[0]) for layer in heads.layers)


def are_equal(blocks: nn.ModuleList) -> bool:
    """Whether all blocks have parameters of the same names, shapes and dtypes, and train the same of them."""
    kinds = {tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters()) for block in blocks}
    return len(kinds) == 1
