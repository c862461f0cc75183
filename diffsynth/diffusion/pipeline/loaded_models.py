"""`LoadedModels`: drops a pipeline's encoders before it loads the network.

Both are in memory only if a template calls the network.
"""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.memory import FrozenMemory
from ...core.memory.storage import choose_stored
from ...core.memory.streaming import check_streaming, stream_blocks

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline


class LoadedModels:
    """The models of a pipeline that are in memory. First load the encoders and prepare all requests, then the network.

    Args:
        pipe: A pipeline whose models are built but not loaded.
        memory: How the weights are kept.
        adapters: Adapter files, which are added to the models that their keys name, unmerged.
        scale: Factor of the adapters' updates.

    Raises:
        ValueError: A setting of `memory` does not fit the models. No weight is read before.
    """

    def __init__(
        self, pipe: "BasePipeline", memory: FrozenMemory, adapters: Collection[str | Path] = (), scale: float = 1.0
    ):
        self.pipe, self.memory, self.adapters, self.scale = pipe, memory, adapters, scale
        pipe.require(dict.fromkeys(sorted(pipe.models_of((), model_fn=True)), "sampling"))
        models = {name: pipe.named_model(name) for name in pipe.built_models}
        self.storages = dict.fromkeys(choose_stored(memory.storage, memory.stored, models, ()), memory.storage)
        if memory.stream_blocks:
            check_streaming(pipe.network, memory.stream_blocks, trained=())
        self.names: set[str] = set()

    def load_encoders(self, also: Iterable[str] = ()) -> None:
        """Load the models that the units call, and those that decode: some units call these as well.

        Args:
            also: Further models, such as those that templates call.
        """
        self._have({*self.pipe.models_of(self.pipe.units, model_fn=False), *self.pipe.decoding_models, *also})

    def load_network(self) -> None:
        """Drop the models that only encode, then load those that `model_fn` calls."""
        self._have({*self.pipe.in_iteration_models, *self.pipe.decoding_models})

    def _have(self, names: Iterable[str]) -> None:
        """Drop the other models in memory, then load those of these models that are not there yet."""
        wanted = self.pipe.built_models & set(names)
        self.pipe.drop_models(self.names - wanted)
        self._load(wanted - self.names)
        self.names = wanted

    def _load(self, names: set[str]) -> None:
        # The first one is `pipe.network`, whose blocks stream.
        streamed = names & set(self.pipe.in_iteration_models[:1] if self.memory.stream_blocks else ())
        self.pipe.read_weights(names, in_host_memory=streamed, storages=self.storages)
        for path in self.adapters:
            for name in names.intersection(self.pipe.adapted_by(path)):
                self.pipe.load_lora(name, path, self.scale)
        if streamed:
            stream_blocks(self.pipe.network, self.memory.stream_blocks, self.memory.stream_buffers, self.pipe.device)
