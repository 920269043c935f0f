"""Arms of a pre-training run: other ways to train the same islands on as many tokens, as recipes.

From a recipe of ``R`` rounds of ``H`` local steps on ``N`` islands, every arm takes about ``R H N`` batches:

- ``synchronous``, ``qsdp``: ``R H`` rounds of one step;
- ``diloco``: the recipe's own rounds;
- ``async_diloco``: as many arrivals as make up the batches, an island's share in proportion to its speed;
- ``acco``: stages in which every island gathers ``GATHERED`` batches, after one that finds nothing made.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

from mycel.errors import RecipeError
from mycel.fleet import load_fleet
from mycel.recipe.schema import Recipe

ISLAND_ARMS = ("synchronous", "diloco", "async_diloco", "acco", "qsdp")
GATHERED = 4
UNBIASED = {"wire.brief_codec": "lattice(8)", "wire.codec": "rounding(8)"}
OWN_KNOBS = ("fresh", "warmup", "final_rate")


def island_arm(recipe: Recipe, name: str, islands: int) -> Recipe:
    """Return the recipe of an arm that trains as ``name`` does.

    Raises
    ------
    RecipeError
        The recipe is not one of DiLoCo's, from whose rounds the others follow.
    """
    if recipe.system != "diloco":
        raise RecipeError(
            f"compare lists {name!r}, whose steps follow from DiLoCo's rounds, and system is {recipe.system!r}: "
            'set system = "diloco", or take it out of compare'
        )
    changes = _MADE[name](recipe, islands)
    common = {key: value for key, value in recipe.knobs.items() if key in OWN_KNOBS}
    knobs = {**(recipe.knobs if name in {"diloco", "async_diloco"} else common), **changes.pop("knobs", {})}
    return recipe.replace({"system": name, **changes, "knobs": knobs, "compare": []})


def _synchronous(recipe: Recipe, islands: int) -> dict[str, Any]:
    rounds = recipe.rounds
    every = max(1, rounds.local_steps * rounds.evaluate_every)
    return {
        "rounds.count": rounds.count * rounds.local_steps,
        "rounds.local_steps": 1,
        "rounds.evaluate_every": every,
    }


def _quantised(recipe: Recipe, islands: int) -> dict[str, Any]:
    return {**_synchronous(recipe, islands), **UNBIASED, "wire.error_feedback": False}


def _asynchronous(recipe: Recipe, islands: int) -> dict[str, Any]:
    rounds, fleet = recipe.rounds, load_fleet(recipe.fleet.devices)
    speeds = [fleet[node].gflops for node in range(islands)]
    steps = [max(1, int(rounds.local_steps * speed / max(speeds))) for speed in speeds]
    return {
        "rounds.count": ceil(rounds.count * rounds.local_steps * islands / (sum(steps) / islands)),
        "rounds.pace": "buffered(1)",
        "rounds.staleness": 0.0,
        "rounds.evaluate_every": islands * rounds.evaluate_every,
        "knobs": {"horizon": rounds.count * rounds.local_steps},
    }


def _accumulating(recipe: Recipe, islands: int) -> dict[str, Any]:
    rounds = recipe.rounds
    stages = ceil(rounds.count * rounds.local_steps / GATHERED) + 1
    return {
        "rounds.count": stages,
        "rounds.local_steps": GATHERED,
        "rounds.evaluate_every": max(1, stages // (2 * rounds.count)) * 2,
        "knobs": {"accumulate": GATHERED},
    }


_MADE: dict[str, Callable[[Recipe, int], dict[str, Any]]] = {
    "synchronous": _synchronous,
    "diloco": lambda recipe, islands: {},
    "async_diloco": _asynchronous,
    "acco": _accumulating,
    "qsdp": _quantised,
}
