"""Who masks with whom: everyone with everyone, or a random regular graph that is sparse and safe enough.

In the sparse graph parties stand on a ring in random order, each beside its k/2 next on either side (a Harary graph).
The degree is the smallest that keeps small the odds of three failures in a round, for any set of parties that leaves or
colludes and was chosen without knowledge of the order (Bell et al. 2020, section 3): a party's secrets cannot be
rebuilt although few enough left, and the round is repeated; the coordinator and its accomplices can rebuild both
secrets of a party; the parties that are neither fall apart into groups whose sums could be told separately, for which
the ring must be cut at two places, each k/2 long.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, comb

REPEATED = 1e-2  # odds that a round has to be repeated
BETRAYED = 1e-6  # odds of either failure of privacy
COLLUDING = 0.2  # share of parties that may work with the coordinator


@dataclass(frozen=True)
class Terms:
    """What a round of masking agrees on.

    Attributes
    ----------
    tag : str
        Names the round and the attempt; nothing made under one tag is good under another.
    neighbours : dict of int to tuple of int
        With whom each party masks; symmetric.
    threshold : int
        How many of a party and its neighbours rebuild one of its secrets.
    """

    tag: str
    neighbours: dict[int, tuple[int, ...]]
    threshold: int

    def holders(self, node: int) -> tuple[int, ...]:
        """Who holds shares of a party's secrets: its neighbours and itself, in order."""
        return tuple(sorted((*self.neighbours[node], node)))


def complete(tag: str, parties: Sequence[int], staying: float) -> Terms:
    """Everyone with everyone; ``staying`` is the share of parties that is enough to open the sum."""
    threshold = need(len(parties), staying)
    return Terms(tag, {node: tuple(other for other in sorted(parties) if other != node) for node in parties}, threshold)


def sparse(tag: str, parties: Sequence[int], staying: float, seed: int, degree: int = 0) -> Terms:
    """Everyone with ``degree`` others, by default as few as is safe; the order on the ring follows from ``seed``."""
    need(len(parties), staying)
    degree, threshold = _degree(len(parties), staying) if not degree else (degree, (degree + 1) // 2 + 1)
    if degree >= len(parties) - 1:
        return complete(tag, parties, staying)
    ring = sorted(parties)
    random.Random(seed).shuffle(ring)
    places = {node: place for place, node in enumerate(ring)}
    steps = [step for step in range(-(degree // 2), degree // 2 + 1) if step]
    beside = {node: tuple(sorted(ring[(places[node] + step) % len(ring)] for step in steps)) for node in sorted(ring)}
    return Terms(tag, beside, threshold)


def need(parties: int, staying: float) -> int:
    """How many of ``parties`` must stay.

    Raises
    ------
    ValueError
        For fewer than two parties, whose sum hides nobody, or a share that is not above a half and at most 1.
    """
    if parties < 2:
        raise ValueError(f"a sum over {parties} parties hides nobody: at least 2 are needed")
    if not 0.5 < staying <= 1:
        raise ValueError(f"the share {staying} of parties that opens a sum is not above 0.5 and at most 1")
    return ceil(staying * parties - 1e-9)


@lru_cache(maxsize=256)
def _degree(parties: int, staying: float) -> tuple[int, int]:
    """Smallest even degree and a threshold for it; the number of others where no smaller one is safe."""
    stay, accomplices = need(parties, staying), int(COLLUDING * parties)
    gone = (parties - stay + accomplices) / parties
    for degree in range(2, parties - 1, 2):
        if comb(parties, 2) * min(gone, 1.0) ** degree > BETRAYED:
            continue
        for threshold in range(degree // 2 + 1, degree + 2):
            few = parties * _below(parties, stay, degree + 1, threshold)
            many = parties * (1 - _below(parties, accomplices, degree + 1, threshold))
            if few <= REPEATED and many <= BETRAYED:
                return degree, threshold
    return parties - 1, stay


def _below(whole: int, marked: int, drawn: int, count: int) -> float:
    """Odds that of ``drawn`` out of ``whole``, of which some are marked, fewer than ``count`` are marked."""
    ways = sum(comb(marked, hit) * comb(whole - marked, drawn - hit) for hit in range(min(count, drawn + 1)))
    return ways / comb(whole, drawn)
