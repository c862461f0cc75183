"""What a run may use: recipes that trade time for memory."""

from .recipe import MemoryRecipe

__all__ = ["MemoryRecipe"]
