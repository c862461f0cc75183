"""What miniatures share of autoencoders: statistics of latents, and encoding as ours do."""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from diffsynth.pipelines.autoencoders.flux2 import Flux2VAE


def encoding_to_means() -> AbstractContextManager:
    """Inside, diffusers' autoencoders encode to the means of their distributions, as ours do, not to samples."""
    return mock.patch.object(DiagonalGaussianDistribution, "sample", lambda self, *_: self.mean)


def give_batch_norm_statistics(folder: Path) -> None:
    """Give an autoencoder of FLUX.2 statistics of latents, which it has in a batch norm."""
    vae, generator = Flux2VAE.from_pretrained(folder), torch.Generator().manual_seed(0)
    vae.bn.running_mean.normal_(generator=generator)
    vae.bn.running_var.uniform_(0.5, 1.5, generator=generator)
    config = (folder / "config.json").read_text()
    vae.save_pretrained(folder)
    (folder / "config.json").write_text(config)  # which names the library's class


def give_latent_statistics(file: Path) -> None:
    """Give an autoencoder of Qwen-Image statistics of latents, which it has in its config.json, `file`."""
    generator = torch.Generator().manual_seed(0)
    config = json.loads(file.read_text())
    config["latents_mean"] = torch.randn(16, generator=generator).tolist()
    config["latents_std"] = (0.5 + torch.rand(16, generator=generator)).tolist()
    file.write_text(json.dumps(config))
