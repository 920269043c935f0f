"""Bamboo (Thorpe et al. 2023): every stage of a pipeline also holds its successor's, and takes over when it dies.

    stage s holds units U_s and a shadow of U_{s+1}; the last one shadows the first
    shadows receive the summed gradients and take the same steps, so they are the holder's to the bit
    forward of a shadow: computed ahead, while its holder's gradients are awaited; backward only after a death
    s + 1 dies:  s computes U_s and U_{s+1}, is given a shadow of U_{s+2}; s - 1 is given one of U_{s+1}

Only what the dead stage was computing is lost: what was computed ahead for the torn step is not computed again. Without
deaths it is the plain pipeline, to the bit. The paper interleaves the redundant forward by a fixed schedule and pauses
one pipeline of several; here the step that was torn is begun again by all, with what they had computed of it kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from mycel.collectives.formation import Formation, Recovery, Segment, even
from mycel.errors import EngineError
from mycel.rounds.laboratory import Measured

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory


@dataclass(frozen=True)
class Bamboo(Recovery):
    """Redundant computation.

    Parameters
    ----------
    units, pieces : int
        Of the chain, and of a step's batch.
    pipelines : int
        Among which members and pieces are shared out.
    """

    units: int
    pieces: int
    pipelines: int = 1

    redundant = True

    def formation(self, epochs: Sequence[Sequence[int]]) -> Formation:
        """Each dead member's segments go to its predecessor, epoch by epoch."""
        ways = [even(self.units, members) for members in _shared(epochs[0], self.pipelines)]
        for before, now in pairwise(epochs):
            dead = set(before) - set(now)
            ways = [_taken_over(way, dead) for way in ways]
            ways = [way for way in ways if way]
        if not ways:
            raise EngineError("no pipeline has a rank that is left: resume from a checkpoint on disk")
        shares = _shared(range(self.pieces), len(ways))
        return Formation(
            tuple(ways), tuple(map(tuple, shares)), tuple(shadow for way in ways for shadow in _shadows(way))
        )


def _taken_over(way: tuple[Segment, ...], dead: set[int]) -> tuple[Segment, ...]:
    """Give every segment of the dead to the nearest member before it that lives."""
    if all(segment.member in dead for segment in way):
        return ()
    taken = []
    for place, segment in enumerate(way):
        member = next(way[place - back].member for back in range(len(way)) if way[place - back].member not in dead)
        taken.append(Segment(member, segment.first, segment.last))
    return tuple(taken)


def _shadows(way: tuple[Segment, ...]) -> list[Segment]:
    """Every segment is shadowed by the member before it, round the ring."""
    shadows = []
    for place, segment in enumerate(way):
        before = [way[place - back].member for back in range(1, len(way))]
        holder = next((member for member in before if member != segment.member), None)
        if holder is not None:
            shadows.append(Segment(holder, segment.first, segment.last))
    return shadows


def _shared(items: Sequence[int], among: int) -> list[list[int]]:
    """Share out in order, as equal as they come."""
    edges = [len(items) * place // among for place in range(among + 1)]
    return [list(items[first:last]) for first, last in pairwise(edges)]


def claim(lab: Laboratory) -> Measured:
    """Two ranks die one after the other; survivors go on along the losses of an undisturbed run."""
    from mycel.pretrain.drill import drilled
    from mycel.pretrain.drill_rank import Drill

    undisturbed = drilled(Drill("bamboo"))
    killed = drilled(Drill("bamboo", deaths=((2, 2, "backward", 1), (5, 0, "forward", 1))))
    apart = killed.apart(undisturbed)
    return Measured(
        f"ranks 2 and 0 of 4 killed at steps 2 and 5: losses at most {apart:.1e} (relative) from an undisturbed run's, "
        f"{killed.survivors} processes never restarted, {killed.spared} forward passes of the torn steps not repeated; "
        f"{killed.lost_steps} steps lost",
        apart < 1e-6 and killed.survivors == 2 and killed.spared > 0 and killed.lost_steps == 0,
        {"apart": apart, "spared": killed.spared, "recovery_seconds": max(killed.seconds)},
    )
