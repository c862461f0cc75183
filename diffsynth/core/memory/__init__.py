"""What a run may use: recipes that trade time for memory."""

from .compile import compile_blocks, repeated_blocks
from .recipe import MemoryRecipe

__all__ = ["MemoryRecipe", "compile_blocks", "repeated_blocks"]
