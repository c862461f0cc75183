"""`Aesthetic`: how people rate the beauty of pictures, by CLIP's embeddings."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from ...core.input_files import beside, describe, digest_of_all
from ...core.loader import ModelConfig, check_weights, load_weights
from ...core.ranges import BatchSize, NonZero
from .clip import ClipReward
from .network import frozen


class Aesthetic(ClipReward):
    """The aesthetic score of LAION's predictor v2, from 1 to 10; pictures have 5 to 6.5. Prompts have no part in it.

    The predictor (https://github.com/christophschuhmann/improved-aesthetic-predictor) is five linear layers on the
    normalised embedding of CLIP ViT-L/14. They have no activations between them, so that the score is an affine
    function of the embedding, which makes it easy to cheat: reward something else beside it.

    Args:
        model: The CLIP.
        predictor: The layers' weights, as safetensors.
        batch_size: Pictures per forward.
    """

    def __init__(self, model: ModelConfig, predictor: ModelConfig, batch_size: BatchSize = 16, weight: NonZero = 1.0):
        super().__init__(model, batch_size, weight)
        self.predictor = predictor

    @cached_property
    def predictor_files(self) -> list[Path]:
        """The files of the layers' weights."""
        return self.predictor.resolve()

    def find(self) -> None:
        super().find()
        _ = self.predictor_files

    @cached_property
    def version(self) -> str:
        files = beside(self.predictor_files[0], self.predictor_files)
        return f"{super().version} {digest_of_all(describe(files))}"

    @cached_property
    def network(self) -> nn.Module:
        clip = super().network
        clip.aesthetic = predictor_of(clip.config.projection_dim)
        check_weights(clip.aesthetic, self.predictor_files)
        load_weights(clip.aesthetic, self.predictor_files)
        return frozen(clip)

    def score_prepared(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.network.aesthetic.layers(self.image_embeddings(inputs))[:, 0]


def predictor_of(width: int) -> nn.Module:
    """The predictor's layers for embeddings of this width; named as in its file, where some numbers are dropouts'."""
    layers = OrderedDict()
    for name, size in zip("02467", (1024, 128, 64, 16, 1), strict=True):
        layers[name] = nn.Linear(width, size)
        width = size
    return nn.ModuleDict({"layers": nn.Sequential(layers)})
