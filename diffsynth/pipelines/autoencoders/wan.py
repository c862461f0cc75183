"""The autoencoders of Wan 2.1 and 2.2, in normalised latents.

Shapes: B batch, C channels, F frames, T latent frames, h w latent size, H W size in pixels.
"""

from diffusers import AutoencoderKLWan

from ...diffusion.pipeline.vae import VideoVAE


class WanVAE(VideoVAE, AutoencoderKLWan):
    """The released autoencoder: the first frame has a latent frame of its own, each further one stands for four frames.

    Its convolutions see no later frame, so that latents of a video's beginning are the beginning of its latents.
    """
