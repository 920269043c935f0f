"""Which systems there are: metadata at once, code only when one is used."""

from __future__ import annotations

import importlib
from difflib import get_close_matches
from typing import TYPE_CHECKING

from mycel.catalog.entries import ENTRIES as TUNING
from mycel.catalog.entries import Entry
from mycel.catalog.generating import GENERATING
from mycel.catalog.pretraining import PRETRAINING
from mycel.catalog.swarming import SWARMING
from mycel.errors import RecipeError

if TYPE_CHECKING:
    from mycel.recipe.schema import Recipe
    from mycel.rounds.laboratory import Claim
    from mycel.rounds.system import System

__all__ = ["ENTRIES", "Entry", "entry", "load_claim", "load_system"]

ENTRIES: tuple[Entry, ...] = (*TUNING, *PRETRAINING, *SWARMING, *GENERATING)


def entry(name: str) -> Entry:
    """Return the entry called ``name``."""
    for known in ENTRIES:
        if known.name == name:
            return known
    names = [known.name for known in ENTRIES]
    near = get_close_matches(name, names, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else "`mycel systems` lists them"
    raise RecipeError(f"system is {name!r}, which is not known: {hint}")


def load_system(recipe: Recipe) -> System:
    """Import the system that a recipe names and build it with the recipe's knobs."""
    about = entry(recipe.system)
    if about.way == "segments":
        raise RecipeError(
            f"system is {recipe.system!r}, which works in segments and not in rounds: `mycel claims {recipe.system}`"
            " measures it, `mycel peer` and `mycel serve --swarm` use it"
        )
    system: System = getattr(importlib.import_module(about.module), about.factory)(recipe)
    pace = recipe.rounds.pace.partition("(")[0]
    if pace not in system.paces:
        raise RecipeError(
            f"rounds.pace is {recipe.rounds.pace!r}, which is unsound for the system {recipe.system!r}: "
            f"it takes {' or '.join(system.paces)}"
        )
    importlib.import_module("mycel.rounds.pairing").check_pairing(recipe, system)
    return system


def load_claim(about: Entry) -> Claim:
    """Import the function that measures an entry's claim."""
    claim: Claim = getattr(importlib.import_module(about.module), about.measure)
    return claim
