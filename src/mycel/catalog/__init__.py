"""Which systems there are, as data: nothing is imported to list them."""

from __future__ import annotations

from difflib import get_close_matches

from mycel.catalog.entry import Entry
from mycel.catalog.generating import GENERATING
from mycel.catalog.inside import INSIDE
from mycel.catalog.planning import PLANNING
from mycel.catalog.pretraining import PRETRAINING
from mycel.catalog.swarming import SWARMING
from mycel.catalog.tuning import TUNING
from mycel.errors import RecipeError

__all__ = ["ENTRIES", "Entry", "entry"]

ENTRIES: tuple[Entry, ...] = (*TUNING, *PRETRAINING, *PLANNING, *INSIDE, *SWARMING, *GENERATING)


def entry(name: str) -> Entry:
    """Return the entry called ``name``."""
    for known in ENTRIES:
        if known.name == name:
            return known
    names = [known.name for known in ENTRIES]
    near = get_close_matches(name, names, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else "`mycel systems` lists them"
    raise RecipeError(f"system is {name!r}, which is not known: {hint}")
