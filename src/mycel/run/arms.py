"""A run's arms: the system itself, and what it is compared with, as recipes over the same machinery.

- ``local``: each party alone, in one uninterrupted piece of training as long as its part in the federation and the
  personal step together, so that joining has nothing to gain from longer training.
- ``centralised``: one party that holds everything, which privacy forbids; as many steps as all parties together.
- those of `mycel.run.islands`: other ways to pre-train the same islands on as many tokens.
- ``personal``: a short step at home on each party's own data, from the federation's final state.
"""

from __future__ import annotations

from dataclasses import dataclass

from mycel.recipe.schema import Recipe
from mycel.run.islands import ISLAND_ARMS, island_arm

_ALONE = {
    "rounds.count": 1,
    "rounds.cohort": 1.0,
    "rounds.quorum": 1.0,
    "rounds.pace": "synchronous",
    "knobs": {},
    "guard": {},
    "threat": {},
}
_PLAIN_WIRE = {"wire.codec": "raw", "wire.brief_codec": "raw", "wire.error_feedback": False}


@dataclass(frozen=True)
class Arm:
    """One arm: its recipe, whether one node holds all data, and the arm whose final state it starts from."""

    name: str
    recipe: Recipe
    pooled: bool = False
    after: str = ""


def arms_of(recipe: Recipe, parties: int) -> list[Arm]:
    """Return the arms of a run; the longest single piece of work comes first, so that cores are never idle for it."""
    rounds = recipe.rounds
    steps = rounds.count * rounds.local_steps
    share = 1.0 if rounds.pace != "sequential" else 1 / parties
    extra = recipe.personal_steps if "personal" in recipe.compare else 0
    ranks = recipe.trainable.rank
    made = {
        "centralised": lambda: Arm(
            "centralised",
            recipe.replace(
                {
                    **_ALONE,
                    **_PLAIN_WIRE,
                    "system": "fedavg",
                    "rounds.local_steps": max(1, round(steps * parties * rounds.cohort * share)),
                    "trainable.rank": ranks if isinstance(ranks, int) else max(ranks),
                }
            ),
            pooled=True,
        ),
        "local": lambda: Arm(
            "local",
            recipe.replace(
                {
                    **_ALONE,
                    **_PLAIN_WIRE,
                    "system": "local",
                    "rounds.local_steps": max(1, round(steps * rounds.cohort * share)) + extra,
                }
            ),
        ),
        "personal": lambda: Arm(
            "personal",
            recipe.replace({**_ALONE, **_PLAIN_WIRE, "system": "local", "rounds.local_steps": recipe.personal_steps}),
            after="system",
        ),
    }
    beside = [made[name]() for name in ("centralised", "local") if name in recipe.compare]
    last = [made["personal"]()] if "personal" in recipe.compare else []
    # The arms that exchange every step have the most to do, so they come before the system's own few rounds.
    islands = [Arm(name, island_arm(recipe, name, parties)) for name in ISLAND_ARMS if name in recipe.compare]
    return [*beside, *islands, Arm("system", recipe), *last]
