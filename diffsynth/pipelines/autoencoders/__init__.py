"""Autoencoders that several families share; that of diffusion/pipeline/autoencoder_kl.py names no model."""
