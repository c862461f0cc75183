"""The autoencoder that several families share, in normalised latents."""

from diffusers import AutoencoderKL

from ...diffusion.pipeline.vae import NormalisedVAE


class NormalisedAutoencoderKL(NormalisedVAE, AutoencoderKL):
    """diffusers' AutoencoderKL, whose configuration has the shift and the scale of its latents."""
