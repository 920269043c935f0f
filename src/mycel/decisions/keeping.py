"""What each block leaves for its way back: kept, computed again, or sent away, so that it fits and costs least time.

A multiple-choice knapsack. Bytes at the peak: what all blocks leave, and the most that one block needs for itself when
its way back begins (its operations are there again while it is computed again). Sources: Chen et al. 2016 (computing
again), Korthikanti et al. 2022 (selectively), Ren et al. 2021 (sending away).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from mycel.decisions.contract import Decision
from mycel.errors import RecipeError
from mycel.recipe.schema import Layout

MIB = 1 << 20
WAYS = ("keep", "selective", "recompute", "offload")
SPEED = 2e10  # operations a second of a core, nominal: ranks must choose alike, whatever they measure
DISK = 1e9  # bytes a second to and from a file, nominal
DIVIDED = {"zero_bubble", "zbv"}  # schedules whose way back is in two pieces, which torch's selective form is not
AGAIN = {"selective", "recompute"}  # ways that need the block's operations again while it goes back
CHEAP = 0.1  # share of a block's forward that lies between its matrix products
POINTS = 4096  # of time and bytes that are followed at once; beyond it the closest are merged, to the safe side


@dataclass(frozen=True)
class Treatment:
    """One way with one block.

    Attributes
    ----------
    seconds : float
        More than if it were kept.
    bytes : float
        Left from the way forward to the way back, for all pieces in flight.
    again : float
        Needed besides while this block goes back.
    """

    name: str
    seconds: float
    bytes: float
    again: float = 0.0


@dataclass(frozen=True)
class Room:
    """Blocks, the ways with each, and the bytes that there are."""

    blocks: tuple[tuple[Treatment, ...], ...]
    bytes: float


Chosen = tuple[int, ...]  # which way with each block


class Knapsack(Decision[Room, Chosen]):
    """Least time within the room: exact as long as no more than ``POINTS`` trade-offs are open."""

    def decide(self, observation: Room) -> Chosen:
        """Return a way for each block; ``RecipeError`` when none fits."""
        found: list[Chosen] = []
        for again in sorted({way.again for ways in observation.blocks for way in ways}):
            chosen = _within(observation, again, observation.bytes - again)
            if chosen is not None:
                found.append(chosen)
        if not found:
            least = min(peak(observation, each) for each in _extremes(observation))
            raise RecipeError(
                f"layout.activation_mib is {observation.bytes / MIB:.3g}, and {len(observation.blocks)} blocks need "
                f"{least / MIB:.3g} at least: try that, a smaller training.batch_size or data.max_length"
            )
        return min(found, key=lambda chosen: self.cost(observation, chosen))

    def fault(self, observation: Room, action: Chosen) -> str:
        """The peak must fit."""
        needed = peak(observation, action)
        return "" if needed <= observation.bytes else f"needs {needed:.0f} bytes, has {observation.bytes:.0f}"

    def cost(self, observation: Room, action: Chosen) -> float:
        """Return the seconds lost."""
        return sum(ways[way].seconds for ways, way in zip(observation.blocks, action, strict=True))


def peak(room: Room, chosen: Chosen) -> float:
    """Bytes when most is held."""
    ways = [ways[way] for ways, way in zip(room.blocks, chosen, strict=True)]
    return sum(way.bytes for way in ways) + max(way.again for way in ways)


def ways_of(layout: Layout, blocks: int) -> list[str]:
    """What each block leaves where the layout says so."""
    named = [str(way) for way in layout.activations] or ["recompute" if layout.recompute else "keep"]
    return named * blocks if len(named) == 1 else named


def in_flight(layout: Layout) -> int:
    """Pieces that a stage may hold at once."""
    if layout.pipeline == 1:
        return 1
    first_in_first_out = layout.schedule in {"1f1b", "zero_bubble"} and layout.chunks == 1
    return min(layout.micro_batches, layout.pipeline) if first_in_first_out else layout.micro_batches


def room_of(left: Mapping[str, float], leaves: float, flops: float, blocks: int, layout: Layout, limit: float) -> Room:
    """Return the choice that a rank of a layout has, of blocks alike.

    Parameters
    ----------
    left : mapping of str to float
        Bytes that an undivided block leaves by each way, for one piece, what leaves it among them.
    leaves : float
        Bytes that leave a block.
    flops : float
        Of a block's forward for one piece.
    limit : float
        Bytes that there are.
    """
    pieces, share = layout.micro_batches, layout.tensor
    kept = {way: (left[way] - leaves) / share + leaves for way in WAYS}
    lost = {
        "keep": 0.0,
        "selective": CHEAP * flops / share / SPEED,
        "recompute": flops / share / SPEED,
        "offload": 2 * (kept["keep"] - kept["offload"]) / DISK,
    }
    ways = tuple(
        Treatment(
            way, pieces * lost[way], in_flight(layout) * kept[way], kept["keep"] - kept[way] if way in AGAIN else 0
        )
        for way in WAYS
        if way != "selective" or layout.schedule not in DIVIDED
    )
    return Room((ways,) * blocks, limit)


def every_choice(room: Room) -> list[Chosen]:
    """Every combination of ways, for small cases."""
    return list(product(*(range(len(ways)) for ways in room.blocks)))


def _within(room: Room, again: float, left: float) -> Chosen | None:
    """Least time with ways that need no more than ``again`` for themselves and leave no more than ``left``."""
    points: list[tuple[float, float, Chosen]] = [(0.0, 0.0, ())]
    for ways in room.blocks:
        more = [
            (size + way.bytes, seconds + way.seconds, (*chosen, index))
            for size, seconds, chosen in points
            for index, way in enumerate(ways)
            if way.again <= again and size + way.bytes <= left
        ]
        points = _frontier(more)
    return min(points, key=lambda point: point[1])[2] if points else None


def _frontier(points: Sequence[tuple[float, float, Chosen]]) -> list[tuple[float, float, Chosen]]:
    """Drop what another point beats in both; thin out what is left, keeping the smallest and the fastest."""
    kept: list[tuple[float, float, Chosen]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    if len(kept) > POINTS:
        step = (len(kept) - 1) / (POINTS - 1)
        kept = [kept[round(place * step)] for place in range(POINTS)]
    return kept


def _extremes(room: Room) -> list[Chosen]:
    """For each bound on what a block may need for itself, the ways that leave least."""
    found = []
    for again in sorted({way.again for ways in room.blocks for way in ways}):
        least = []
        for ways in room.blocks:
            allowed = [index for index, way in enumerate(ways) if way.again <= again]
            if allowed:
                least.append(min(allowed, key=lambda index, ways=ways: ways[index].bytes))  # type: ignore[misc]
        if len(least) == len(room.blocks):
            found.append(tuple(least))
    return found
