"""Autoencoders of models that several families share; `diffusion/pipeline/autoencoder_kl.py` has the general one."""
