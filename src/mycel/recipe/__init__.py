"""What is to be done: typed, frozen, printable, hashable."""

from mycel.recipe.load import built_in, load_recipe
from mycel.recipe.schema import Recipe

__all__ = ["Recipe", "built_in", "load_recipe"]
