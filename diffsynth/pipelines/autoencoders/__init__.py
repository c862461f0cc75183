"""Autoencoders of models that several families share, in normalised latents."""
