"""One trainer for diffusion models, in which every experiment is a Hydra composition."""

__version__ = "0.1.0"
