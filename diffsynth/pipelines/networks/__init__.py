"""What a family adds to the networks of the libraries: attention, positions, names of layers in LoRA files."""
