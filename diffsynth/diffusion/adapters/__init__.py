"""LoRA and its kin: which layers are adapted, and the files that hold the result."""
