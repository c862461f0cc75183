"""ControlNets: a second network reads images, and its outputs are added to the outputs of the transformer's blocks.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models" (https://arxiv.org/abs/2302.05543).
"""
