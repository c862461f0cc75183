"""`JpegSize`: how well pictures compress."""

from collections.abc import Sequence
from io import BytesIO
from typing import Annotated

import torch
from PIL import Image
from torch import Tensor

from ...core.ranges import NonZero, check_arguments, within
from .base import Pictures, Reward, Rows

Quality = Annotated[int, within(1, 100)]


class JpegSize(Reward):
    """Minus the size of a picture as a JPEG file, in 1000 bytes: plain pictures score high.

    The compressibility of DDPO (Black et al. 2023, https://arxiv.org/abs/2305.13301); a weight of -1 is its
    incompressibility.

    Args:
        quality: Pillow's quality of the JPEG file.
    """

    def __init__(self, quality: Quality = 95, weight: NonZero = 1.0):
        super().__init__(weight)
        check_arguments(JpegSize.__init__, "reward.", quality=quality)
        self.quality = quality

    @property
    def version(self) -> str:
        return f"JpegSize quality={self.quality}"

    def score(self, pictures: Pictures, prompts: Sequence[str], rows: Rows, device: torch.device) -> Tensor:
        return torch.tensor([-self._bytes(picture) / 1000 for picture in pictures])

    def _bytes(self, picture: Image.Image) -> int:
        file = BytesIO()
        picture.convert("RGB").save(file, "JPEG", quality=self.quality)
        return file.tell()
