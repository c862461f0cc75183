"""The parts that a family is declared of: its networks, and the folders of tokenizers and processors."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline

LIBRARIES = ("diffusers", "transformers")


@dataclass(frozen=True)
class Network:
    """A network of a family.

    Args:
        *kinds: Names of classes of diffusers or transformers, as a config.json has them, or a subclass of one, which is
            built in its place.
        after: Called with the network when it is built, before its weights are read.
        lora: What LoRA files call the network; None for a network that has no LoRA.
    """

    kinds: tuple[str | type[nn.Module], ...]
    after: Callable[[nn.Module], Any] | None = None
    lora: str | None = None

    def __init__(self, *kinds: str | type[nn.Module], after: Callable | None = None, lora: str | None = None):
        for name, value in {"kinds": kinds, "after": after, "lora": lora}.items():
            object.__setattr__(self, name, value)

    @property
    def subclasses(self) -> dict[str, type[nn.Module]]:
        """What is built in the place of a class of the library, by that class's name."""
        return {library_name(kind): kind for kind in self.kinds if not isinstance(kind, str)}

    def holds(self, module: nn.Module) -> bool:
        """Whether a module is of one of the kinds."""
        return any(
            type(module).__name__ == kind if isinstance(kind, str) else isinstance(module, kind) for kind in self.kinds
        )

    @property
    def names(self) -> list[str]:
        return [library_name(kind) for kind in self.kinds]


@dataclass(frozen=True)
class Folder:
    """A tokenizer or a processor of a family, read from its folder.

    Args:
        kind: Name of a class of transformers.
        check: `check(pipe)`, called when it is read; raises ValueError if it is not the one that the family needs.
        needed_by: The network that cannot do without it.
    """

    kind: str
    check: Callable[["BasePipeline"], None] | None = None
    needed_by: str | None = None

    def read(self, folder: Path) -> Any:
        """Read it; no code of the folder's own is run."""
        import transformers

        own_code = {"trust_remote_code": False} if self.kind.startswith("Auto") else {}
        return getattr(transformers, self.kind).from_pretrained(folder, **own_code)


def library_name(kind: str | type[nn.Module]) -> str:
    """The name that a config.json gives a class of a library, or the class that ours is built in the place of."""
    if isinstance(kind, str):
        return kind
    return next(base.__name__ for base in kind.__mro__ if base.__module__.split(".")[0] in LIBRARIES)
