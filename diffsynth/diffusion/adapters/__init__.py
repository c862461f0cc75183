"""LoRA, LoHa, LoKr and DoRA: adding adapters to layers, and adapter files in the formats of several programs."""
