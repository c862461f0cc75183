"""The autoencoder that several families share, in normalised latents."""

from diffusers import AutoencoderKL

from ...diffusion.pipeline.vae import Latents, NormalisedVAE

FLUX1_STATISTICS, SD3_STATISTICS = (0.3611, 0.1159), (1.5305, 0.0609)  # scaling and shift factor, as released
OWNERS = {FLUX1_STATISTICS: "FLUX.1, Chroma and Z-Image", SD3_STATISTICS: "Stable Diffusion 3"}


class NormalisedAutoencoderKL(NormalisedVAE, AutoencoderKL):
    """diffusers' AutoencoderKL, whose configuration has the shift and the scale of its latents."""

    def check(self, latents: Latents) -> None:
        """Refuse the autoencoder of another model also by its statistics; those of nobody are of one's own."""
        super().check(latents)
        found = self.config.scaling_factor, self.config.shift_factor
        if latents.statistics and found in OWNERS.keys() - {latents.statistics}:
            own = latents.statistics
            raise ValueError(
                f"vae has scaling_factor {found[0]} and shift_factor {found[1]}, which are those of {OWNERS[found]}, "
                f"but this model's are {own[0]} and {own[1]}; set model.vae to the autoencoder that was released with "
                "the transformer."
            )
