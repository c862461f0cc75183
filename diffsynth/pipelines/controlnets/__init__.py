"""The ControlNets of the model families, one per file: the network, what it reads of images, how it begins."""
