"""Which machines keep whose checkpoint in memory, so that most failures leave a copy of everything.

With N machines and m copies of each machine's state (its own among them): where m divides N, groups of m keep each
other's; else all but the last m + N mod m machines are grouped and these form a ring. Failures of f machines at once
are survived with the share of the f-subsets that hold no state's copies all. Source: Wang et al. 2023 (Gemini),
section 4; groups are the best there is where m divides N, and the mixture is near it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from mycel.decisions.contract import Decision
from mycel.errors import RecipeError

Holders = tuple[frozenset[int], ...]  # of each machine's state, the machine itself among them


@dataclass(frozen=True)
class Machines:
    """So many machines, so many copies of each one's state, and how many are expected to fail at once."""

    count: int
    copies: int
    failures: int = 2


class Mixed(Decision[Machines, Holders]):
    """Groups, and a ring of those that fill no group."""

    def decide(self, observation: Machines) -> Holders:
        """Return who holds each machine's state; ``RecipeError`` when there are fewer machines than copies."""
        count, copies = observation.count, observation.copies
        if not 0 < copies <= count:
            raise RecipeError(f"{copies} copies are to lie on {count} machines: try {count} or fewer")
        grouped = count - count % copies - (copies if count % copies else 0)
        holders = [
            frozenset(range(first, first + copies)) for first in range(0, grouped, copies) for _ in range(copies)
        ]
        ring = count - grouped
        holders += [frozenset(grouped + (place + step) % ring for step in range(copies)) for place in range(ring)]
        return tuple(holders)

    def fault(self, observation: Machines, action: Holders) -> str:
        """Every machine holds its own state, and there are as many copies as asked for."""
        for machine, holders in enumerate(action):
            if machine not in holders or len(holders) != observation.copies:
                return f"the state of machine {machine} lies on {sorted(holders)}, not on itself and others"
        return "" if len(action) == observation.count else f"{len(action)} machines have a place"

    def cost(self, observation: Machines, action: Holders) -> float:
        """Return the chance that a failure is not survived in memory."""
        return 1.0 - survival(action, observation.failures)


def survival(holders: Holders, failures: int) -> float:
    """Chance that every state is left when so many machines fail at once, all sets alike; exact by enumeration."""
    found = [all(held - set(dead) for held in holders) for dead in combinations(range(len(holders)), failures)]
    return sum(found) / len(found)


def every_placement(machines: Machines) -> list[Holders]:
    """Every placement there is, for small cases."""
    placements: list[Holders] = [()]
    for machine in range(machines.count):
        others = [other for other in range(machines.count) if other != machine]
        ways = [frozenset({machine, *chosen}) for chosen in combinations(others, machines.copies - 1)]
        placements = [(*placement, way) for placement in placements for way in ways]
    return placements
