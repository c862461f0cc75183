"""Save memory in training, for time: recipes, weights in fewer bits, streaming from host memory, compilation."""

from .recipe import FrozenMemory, MemoryRecipe

__all__ = ["FrozenMemory", "MemoryRecipe"]
