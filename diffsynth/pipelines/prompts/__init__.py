"""How a family tokenizes prompts and embeds them."""
