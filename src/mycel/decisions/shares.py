"""Whole units in unequal shares."""

from __future__ import annotations

from collections.abc import Sequence

from mycel.errors import ModelError


def shares(units: int, weights: Sequence[float]) -> list[range]:
    """Share out whole units in proportion to ``weights`` by largest remainder; every rank gets at least one.

    Raises
    ------
    ModelError
        When there are fewer units than ranks, or a weight is not positive.
    """
    if units < len(weights) or min(weights) <= 0:
        raise ModelError(f"{units} units cannot be shared out as {[round(w, 3) for w in weights]}: one each is needed")
    spare = units - len(weights)
    exact = [spare * weight / sum(weights) for weight in weights]
    counts = [1 + int(part) for part in exact]
    order = sorted(range(len(weights)), key=lambda rank: (int(exact[rank]) - exact[rank], rank))
    for rank in order[: units - sum(counts)]:
        counts[rank] += 1
    edges = [sum(counts[:rank]) for rank in range(len(weights) + 1)]
    return [range(edges[rank], edges[rank + 1]) for rank in range(len(weights))]
