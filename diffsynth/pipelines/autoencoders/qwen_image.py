"""The autoencoder that Qwen-Image, Krea 2 and Anima share, in normalised latents.

Shapes: B batch, h w latent size, H W size in pixels.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor

from ...diffusion.pipeline.vae import SingleFrameVAE


class SingleFrameConv3d(QwenImageCausalConv3d):
    """A causal 3-D convolution that computes a single frame in 2-D, because the frames before it are zeros.

    Only the kernel's last temporal slice meets the frame, so that the result is equal except for rounding. On a CPU
    this makes the encoder 3.2 × faster in fp32 and 1.4 × in bf16, and channels last another 1.1 × and 1.6 ×.
    """

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if x.shape[2] != 1 or cache_x is not None:
            return super().forward(x, cache_x)
        left, _, top, _, _, _ = self._padding
        frame, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x[:, :, 0], self.weight[:, :, -1]))
        return F.conv2d(frame, weight, self.bias, self.stride[1:], (top, left)).unsqueeze(2)


class QwenImageVAE(SingleFrameVAE, AutoencoderKLQwenImage):
    """The released autoencoder of videos, applied to single images."""

    def use_single_frame_convolutions(self) -> None:
        for module in self.modules():
            if type(module) is QwenImageCausalConv3d:
                module.__class__ = SingleFrameConv3d
