"""Through whom: the fastest chain of peers from the first block to the last."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from mycel.decisions.contract import Decision
from mycel.errors import EngineError


@dataclass(frozen=True)
class Offer:
    """Blocks that a peer serves, and what they cost.

    Attributes
    ----------
    peer : str
        Its name.
    first, last : int
        Blocks ``first <= index < last``; any run of them may be used.
    seconds : float
        Of one block for one token.
    latency : float
        Seconds there and back.
    """

    peer: str
    first: int
    last: int
    seconds: float
    latency: float


@dataclass(frozen=True)
class Leg:
    """A peer's part of a route: blocks ``first <= index < last``."""

    peer: str
    first: int
    last: int


@dataclass(frozen=True)
class Wanted:
    """Blocks to be covered, and who offers what."""

    first: int
    last: int
    offers: tuple[Offer, ...]


class Fastest(Decision[Wanted, tuple[Leg, ...]]):
    """Dijkstra over the blocks: an edge is a stay at one peer, its length latency plus computing time."""

    def decide(self, observation: Wanted) -> tuple[Leg, ...]:
        """Return the legs of least total seconds; ``EngineError`` names the first block that nobody holds."""
        best: dict[int, tuple[float, tuple[Leg, ...]]] = {observation.first: (0.0, ())}
        queue = [(0.0, observation.first)]
        while queue:
            seconds, place = heapq.heappop(queue)
            if seconds > best[place][0]:
                continue
            if place == observation.last:
                return best[place][1]
            for offer in observation.offers:
                if offer.first <= place < offer.last:
                    for end in range(place + 1, min(offer.last, observation.last) + 1):
                        total = seconds + offer.latency + (end - place) * offer.seconds
                        if end not in best or total < best[end][0]:
                            best[end] = (total, (*best[place][1], Leg(offer.peer, place, end)))
                            heapq.heappush(queue, (total, end))
        raise EngineError(f"no peer of the swarm holds block {_missing(observation)}: lend it one, or wait")

    def fault(self, observation: Wanted, action: tuple[Leg, ...]) -> str:
        """Legs must follow each other from first to last, each within an offer."""
        place = observation.first
        for leg in action:
            held = any(o.peer == leg.peer and o.first <= leg.first < leg.last <= o.last for o in observation.offers)
            if leg.first != place or not held:
                return f"{leg} does not follow on block {place} or is not offered"
            place = leg.last
        return "" if place == observation.last else f"the route ends at block {place}"

    def cost(self, observation: Wanted, action: tuple[Leg, ...]) -> float:
        """Return the seconds of one token."""
        total = 0.0
        for leg in action:
            mine = [offer for offer in observation.offers if offer.peer == leg.peer]
            fitting = [offer for offer in mine if offer.first <= leg.first and leg.last <= offer.last]
            total += min(o.latency + (leg.last - leg.first) * o.seconds for o in fitting)
        return total


def _missing(wanted: Wanted) -> int:
    """Return the first block that no chain of offers reaches."""
    reached = wanted.first
    while True:
        further = max((o.last for o in wanted.offers if o.first <= reached < o.last), default=reached)
        if further == reached:
            return reached
        reached = further
