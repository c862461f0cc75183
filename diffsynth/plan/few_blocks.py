"""What networks take, told by rehearsals with few of their blocks: each block of a kind adds as much as the others."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

from torch import nn

from ..core.gradient import repeated_lists
from ..core.memory import MemoryRecipe
from ..core.memory.live import bytes_of
from ..diffusion.memory_layout import laid_out_networks
from ..diffusion.training_module import PipelineTrainingModule
from .meta_module import copied
from .rehearsal import Rehearsal, Working, tensors_of

# Blocks of each list, or so many times as many as of which one is checkpointed; the first and the last may be special.
FEW, MORE = 2, 3


class FewBlocks:
    """Stands where a `Rehearsal` of a recipe without streamed blocks does.

    A phase's peak is a straight line in the number of blocks as long as the same moment of it is the highest; where
    that changes between few blocks and all, this is a little too low; a rehearsal of the whole decides.
    """

    def __init__(self, module: PipelineTrainingModule, recipe: MemoryRecipe, cp_size: int = 1):
        self.module, self.recipe, self.cp_size = module, recipe, cp_size
        self.at_rest = bytes_of(tensors_of(module))
        self.lists = {name: blocks for name, blocks in lists_of(module).items() if self.has_many(blocks)}

    @property
    def is_whole(self) -> bool:
        """There are few blocks anyway."""
        return not self.lists

    def has_many(self, blocks: nn.ModuleList) -> bool:
        """Whether it is quicker to rehearse with few of them, twice."""
        return len(blocks) > self.count(FEW, blocks) + self.count(MORE, blocks)

    def count(self, times: int, blocks: nn.ModuleList) -> int:
        """As many as make so many checkpointed ones, and the same rest."""
        every = self.recipe.checkpoint_every
        return times * every + len(blocks) % every

    @cached_property
    def few(self) -> Rehearsal:
        return self._rehearsal()

    @cached_property
    def more(self) -> dict[str, Rehearsal]:
        """With more blocks in one of the lists."""
        return {name: self._rehearsal(name) for name in self.lists}

    def _rehearsal(self, longer: str | None = None) -> Rehearsal:
        counts = {n: self.count(MORE if n == longer else FEW, blocks) for n, blocks in self.lists.items()}
        return Rehearsal(copied(self.module, self.recipe, counts), self.cp_size)

    @property
    def unreached(self) -> Sequence[nn.Parameter]:
        return self.few.unreached  # at the end of the network, however long it is

    def train(self, rows: Sequence, accumulates: bool) -> Working:
        """See `Rehearsal.train`."""
        return self._reckoned(lambda rehearsal: rehearsal.train(rows, accumulates))

    def sample(self, request: Mapping) -> Working:
        """See `Rehearsal.sample`."""
        return self._reckoned(lambda rehearsal: rehearsal.sample(request))

    def _reckoned(self, rehearse: Callable[[Rehearsal], Working]) -> Working:
        few = rehearse(self.few)
        whole = few
        for name, rehearsal in self.more.items():
            blocks = self.lists[name]
            least, most = self.count(FEW, blocks), self.count(MORE, blocks)
            whole = whole.plus((len(blocks) - least) / (most - least), rehearse(rehearsal), few)
        return whole


def lists_of(module: PipelineTrainingModule) -> dict[str, nn.ModuleList]:
    """By their names in the module, the lists of blocks that are all alike, of networks that follow the recipe."""
    followed = {blocks for network in laid_out_networks(module) for blocks in repeated_lists(network).values()}
    return {name: part for name, part in module.named_modules() if part in followed and are_alike(part)}


def are_alike(blocks: nn.ModuleList) -> bool:
    """Whether all of them have the same parameters."""
    kinds = {tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters()) for block in blocks}
    return len(kinds) == 1
