"""What a recipe's ``data.cleaning`` asks for, done to a party's examples where they lie; only counts leave.

"quality"          drops what is short, mostly not letters, or repeats itself
"language(en)"     drops what is in another language
"copies(0.8)"      drops near-duplicates of what came before, from this similarity on
"masks"            masks e-mail, telephone, account, card and network addresses
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from mycel.data.cleaning import COMMON_WORDS, Cleaner, Rules
from mycel.data.examples import Example
from mycel.errors import DataError, RecipeError

NOTHING: dict[str, Any] = {
    "shortest": 0,
    "letters": 0.0,
    "repeated": 1.0,
    "language": "",
    "similarity": 0.0,
    "masks": False,
}
RULE = re.compile(r"([a-z]+)(?:\(([a-z0-9.]+)\))?")


def parse_cleaning(specs: Sequence[str]) -> Rules:
    """Return the rules that a recipe names.

    Raises
    ------
    RecipeError
        A rule is not known, or its argument is not sound.
    """
    chosen = dict(NOTHING)
    for spec in specs:
        match = RULE.fullmatch(spec)
        name, argument = (match[1], match[2]) if match else ("", None)
        if name == "quality" and argument is None:
            plain = Rules()
            chosen |= {"shortest": plain.shortest, "letters": plain.letters, "repeated": plain.repeated}
        elif name == "masks" and argument is None:
            chosen["masks"] = True
        elif name == "language" and argument in COMMON_WORDS:
            chosen["language"] = argument
        elif name == "copies" and re.fullmatch(r"0\.\d+|1\.0|1", argument or ""):
            chosen["similarity"] = float(argument or 0)
        else:
            languages = ", ".join(COMMON_WORDS)
            raise RecipeError(
                f"data.cleaning lists {spec!r}; it knows 'quality', 'masks', 'copies(0.8)' with a similarity of at "
                f"most 1, and 'language(en)' with one of {languages}"
            )
    return Rules(**chosen)


def clean_examples(
    examples: Iterable[Example], specs: Sequence[str], name: str
) -> tuple[list[Example], dict[str, int]]:
    """Return what is kept of a party's examples, masked, in their order, and the counts of what was done.

    Raises
    ------
    DataError
        Nothing is left.
    """
    cleaner = Cleaner(parse_cleaning(specs))
    kept = [
        Example(cleaner.masked(each.prompt), cleaner.masked(each.response), each.label)
        for each in examples
        if cleaner.keeps(f"{each.prompt}\n{each.response}" if each.prompt else each.response)
    ]
    counts = dict(sorted(cleaner.counts.items()))
    if not kept:
        found = ", ".join(f"{reason} {count}" for reason, count in counts.items()) or "no example"
        raise DataError(f"cleaning leaves nothing of the data of {name!r} ({found}): loosen data.cleaning")
    return kept, counts
