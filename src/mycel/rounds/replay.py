"""Training histories that travel as scalars: which seeds a party draws, and weights rebuilt from seeds and scalars.

    w = w_0 + sum_j c_j z(s_j),   s_j from a pool that every holder of the recipe derives

Both ends add the same terms in the same order, so they come to the same bits. A party's draws follow from its seed,
hence nobody has to send which seeds it drew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mycel.errors import RecipeError
from mycel.recipe.schema import Recipe
from mycel.rounds.gradients import walk
from mycel.wire.algebra import seed_of
from mycel.wire.randomness import generator, seed_pool


def pool_of(recipe: Recipe, count: int) -> list[int]:
    """Return the pool of ``count`` seeds that a recipe stands for."""
    return seed_pool(seed_of(recipe.seed, "pool"), count)


def draws(recipe: Recipe, node: int, version: int, steps: int, odds: Tensor) -> Tensor:
    """Return which seeds of the pool ``node`` uses for its ``steps`` steps on ``version``.

    Parameters
    ----------
    odds : Tensor
        How likely each seed is, as whole numbers of at least 1: integers, so that any two machines agree.

    Returns
    -------
    Tensor
        int64 indices into the pool, with repetition.
    """
    edges = odds.to(torch.int64).cumsum(0)
    source = generator(seed_of(recipe.seed, "draws", node, version))
    tickets = torch.randint(0, int(edges[-1]), (steps,), generator=source)
    return torch.searchsorted(edges, tickets, right=True)


def replay(parameters: Mapping[str, nn.Parameter], seeds: Sequence[int], scalars: Tensor) -> None:
    """Add ``sum_j scalars[j] z(seeds[j])`` in place, in the order of ``j``; a scalar of zero costs nothing."""
    for index in scalars.nonzero().flatten().tolist():
        walk(parameters, seeds[index], float(scalars[index]))


def require_forward_passes(recipe: Recipe, plain: bool) -> None:
    """Refuse a recipe that trains otherwise than by two-point estimates, and with ``plain`` by descent alone.

    Raises
    ------
    RecipeError
        Naming every setting at fault and what would do.
    """
    training = recipe.training
    wanted: dict[str, object] = {"gradient": "zeroth-order"}
    if plain:
        wanted |= {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip_norm": 0.0}
    wrong = {key: value for key, value in wanted.items() if getattr(training, key) != value}
    if wrong:
        found = ", ".join(f"{getattr(training, key)!r}" for key in wrong)
        needed = ", ".join(f"training.{key} = {value!r}" for key, value in wrong.items())
        raise RecipeError(f"the system {recipe.system!r} needs {needed}; found {found}")


ONE_ROUND = "answers belong to the seeds of one round: what a codec lost cannot be added to the next"


def require_one_rank(recipe: Recipe) -> None:
    """Refuse ranks of several sizes where parties must hold tensors of one shape."""
    if recipe.trainable.kind == "lora" and isinstance(recipe.trainable.rank, list):
        raise RecipeError(
            f"trainable.rank lists {recipe.trainable.rank}, and the system {recipe.system!r} needs one rank for all: "
            "its parties must hold tensors of one shape"
        )
