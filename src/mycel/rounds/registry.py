"""From the catalogue's entries to code: imported when a recipe or a claim asks for it, and not before."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mycel.catalog import Entry, entry
from mycel.errors import RecipeError
from mycel.recipe.schema import Recipe
from mycel.rounds.pairing import check_pairing
from mycel.rounds.system import System

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Claim


def load_system(recipe: Recipe) -> System:
    """Import the system that a recipe names and build it with the recipe's knobs."""
    about = entry(recipe.system)
    if about.way != "rounds":
        raise RecipeError(
            f"system is {recipe.system!r}, which works by {about.way} and not in rounds: `mycel claims {recipe.system}`"
            " measures it, `mycel peer` and `mycel serve` use it"
        )
    system: System = getattr(importlib.import_module(about.module), about.factory)(recipe)
    pace = recipe.rounds.pace.partition("(")[0]
    if pace not in system.paces:
        raise RecipeError(
            f"rounds.pace is {recipe.rounds.pace!r}, which is unsound for the system {recipe.system!r}: "
            f"it takes {' or '.join(system.paces)}"
        )
    check_pairing(recipe, system)
    return system


def load_claim(about: Entry) -> Claim:
    """Import the function that measures an entry's claim."""
    claim: Claim = getattr(importlib.import_module(about.module), about.measure)
    return claim
