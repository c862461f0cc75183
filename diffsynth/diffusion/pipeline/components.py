"""The components that a family declares: networks, and folders of tokenizers and image processors."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ...core.files import write_text
from ...core.json_text import to_json
from ...core.loader import Layout, read_pretrained
from ..adapters.names import LayerNames

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline

LIBRARIES = ("diffusers", "transformers")


class Network:
    """A network of a family.

    Args:
        *kinds: Classes that the network may have: the name of a class of diffusers or transformers, as its config.json
            has it, or a subclass of such a class, which is then built instead.
        after: Function that is called with the network when it is built, before its weights are read.
        lora: Names of the network in adapter files, or only diffusers' name of it; None is its attribute.
        optional: Whether there are models of the family without it.
        layouts: Layouts of released weights besides the library's.
        made_by: Command that makes the network at `{path}`, for the error of an absent one.
    """

    def __init__(
        self,
        *kinds: str | type[nn.Module],
        after: Callable[[nn.Module], Any] | None = None,
        lora: LayerNames | str | None = None,
        optional: bool = False,
        layouts: Sequence[Layout] = (),
        made_by: str = "",
    ):
        self.kinds, self.after, self.is_optional = kinds, after, optional
        self.layouts, self.made_by = layouts, made_by
        self.lora = LayerNames(prefix=lora) if isinstance(lora, str) else lora

    @property
    def subclasses(self) -> dict[str, type[nn.Module]]:
        """The subclasses that are built instead of a library's classes, by the names of these classes."""
        return {library_name(kind): kind for kind in self.kinds if not isinstance(kind, str)}

    def holds(self, module: nn.Module) -> bool:
        """Whether a module is an instance of one of the kinds."""
        named = [kind for kind in self.kinds if isinstance(kind, str)]
        classes = tuple(kind for kind in self.kinds if not isinstance(kind, str))
        return type(module).__name__ in named or isinstance(module, classes)

    @property
    def names(self) -> list[str]:
        """The names that a config.json may give for the network's class."""
        return [library_name(kind) for kind in self.kinds]


@dataclass(frozen=True)
class Folder:
    """A tokenizer or an image processor of a family, which is read from a folder.

    Args:
        kind: Name of a class of transformers.
        check: `check(pipe)`, called after it is read; raises ValueError if the family needs another one.
        needed_by: Name of the network that cannot be used without it; None if it is optional.
    """

    kind: str
    check: Callable[["BasePipeline"], None] | None = None
    needed_by: str | None = None

    @property
    def is_optional(self) -> bool:
        """Whether there are models of the family without it."""
        return self.needed_by is None

    def read(self, folder: Path | None) -> Any:
        """Read it from a folder, without running code that the folder may hold; None makes one with the defaults."""
        import transformers

        kind = getattr(transformers, self.kind)
        return kind() if folder is None else read_pretrained(kind, folder)


def library_name(kind: str | type[nn.Module]) -> str:
    """The name of a library's class; for a subclass of ours the name of the class that it extends."""
    if isinstance(kind, str):
        return kind
    return next(base.__name__ for base in kind.__mro__ if base.__module__.split(".")[0] in LIBRARIES)


def save(network: nn.Module, folder: Path) -> None:
    """Save a network as its library does; its config.json names the library's class, also for a subclass of ours."""
    network.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if "_class_name" in config:
        named = config | {"_class_name": library_name(type(network))}
        write_text(folder / "config.json", to_json(named, indent=2))
