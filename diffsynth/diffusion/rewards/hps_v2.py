"""`HpsV2`: which pictures people prefer for a prompt, by a CLIP that was trained on rankings of HPD v2."""

from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec

from torch import Tensor, nn
from torch.nn.functional import pad

from ...core.input_files import beside, describe, digest_of_all
from ...core.loader import check_weights, load_weights
from .clip import normalised, resized
from .network import NetworkReward, frozen

ARCHITECTURE = "ViT-H-14"  # OpenCLIP's name
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training set


class HpsV2(NetworkReward):
    """HPS v2 or v2.1, by its weights: cos(picture, prompt) of OpenCLIP's embeddings; usually 0.2 to 0.35.

    Wu et al. 2023 (https://arxiv.org/abs/2306.09341). Scores of the two versions do not compare.
    """

    def find(self) -> None:
        if find_spec("open_clip") is None:
            raise ImportError('open_clip is not installed; pip install "diffsynth-hydra[hps]"')
        super().find()

    @cached_property
    def version(self) -> str:
        return f"HpsV2 {digest_of_all(describe(beside(self.files[0], self.files)))}"

    @cached_property
    def network(self) -> nn.Module:
        import open_clip

        network = open_clip.create_model(ARCHITECTURE, pretrained=None)
        check_weights(network, self.files)
        return frozen(load_weights(network, self.files))

    @cached_property
    def tokenizer(self):
        import open_clip

        return open_clip.get_tokenizer(ARCHITECTURE)

    def prepare(self, pixels: Tensor) -> Tensor:
        """The input (B, 3, S, S) of HPS: the longest side resized, padded with black to a square, and normalised."""
        side = self.network.visual.image_size[0]
        longest = max(pixels.shape[2:])
        pixels = resized(pixels, [round(side * length / longest) for length in pixels.shape[2:]])
        missing = [side - length for length in pixels.shape[2:]]
        top, left = (length // 2 for length in missing)
        pixels = pad(pixels, (left, missing[1] - left, top, missing[0] - top))
        return normalised(pixels, MEAN, STD)

    def score_prepared(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(prompts)).to(inputs.device)
        texts = self.network.encode_text(tokens, normalize=True)
        return (self.network.encode_image(inputs, normalize=True) * texts).sum(1)
