"""The autoencoder that SD3, FLUX.1 and Z-Image share, in normalised latents."""

from diffusers import AutoencoderKL

from .vae import NormalisedVAE


class NormalisedAutoencoderKL(NormalisedVAE, AutoencoderKL):
    """diffusers' AutoencoderKL, whose configuration has the shift and the scale of its latents."""
