"""Oobleck (Jang et al. 2023): pipeline templates made beforehand; broken pipelines are made anew from smaller ones.

    templates: for n = n0 .. N nodes, the split of the units whose slowest stage is fastest
    start:     the fastest set of templates that uses all nodes, with at least f + 1 pipelines (all hold every unit)
    a death:   its pipeline is made anew from the template of the nodes left; with fewer than n0 it borrows a node from
               the largest pipeline that can spare one, or joins the smallest other; missing units are copied from
               another pipeline; the batch's pieces are shared out anew, so a step stays the same sum

Gradients are summed unit by unit over whoever holds it, since pipelines are cut differently. The paper overlaps the
sums with the way back; here they follow it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from mycel.collectives.formation import Formation, Recovery, Segment
from mycel.decisions.templates import Covering, Nodes, divided, templates
from mycel.errors import EngineError
from mycel.rounds.laboratory import Measured

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory


@dataclass(frozen=True)
class Oobleck(Recovery):
    """Pipeline templates.

    Parameters
    ----------
    costs : tuple of float
        Seconds of each unit, in any unit of time.
    pieces : int
        Of a step's batch.
    least : int
        Fewest nodes that hold the model: n0.
    faults : int
        Nodes that may die at once.
    """

    costs: tuple[float, ...]
    pieces: int
    least: int = 1
    faults: int = 1

    def formation(self, epochs: Sequence[Sequence[int]]) -> Formation:
        """Nodes stay in their pipeline while it has enough of them."""
        known = templates(self.costs, self.least, min(len(epochs[0]), len(self.costs)))
        cover = Covering().decide(Nodes(len(epochs[0]), tuple(known.items()), self.pieces, self.faults))
        edges = [sum(cover[:place]) for place in range(len(cover) + 1)]
        groups = [list(epochs[0][first:last]) for first, last in pairwise(edges)]
        for now in epochs[1:]:
            groups = filled([[member for member in group if member in now] for group in groups], self.least)
        # A group that took in another may have more members than the largest template: the last ones wait in it.
        chosen = [known[min(len(group), max(known))] for group in groups]
        ways = tuple(
            tuple(Segment(member, *stage) for member, stage in zip(group, each.stages, strict=False))
            for group, each in zip(groups, chosen, strict=True)
        )
        counts = divided(chosen, self.pieces)
        starts = [sum(counts[:place]) for place in range(len(counts))]
        shares = (tuple(range(start, start + count)) for start, count in zip(starts, counts, strict=True))
        return Formation(ways, tuple(shares))


def filled(groups: list[list[int]], least: int) -> list[list[int]]:
    """Borrow and merge until every group has at least ``least`` members; ``EngineError`` when all are too few."""
    groups = [list(group) for group in groups if group]
    if sum(map(len, groups)) < least:
        raise EngineError(
            f"{sum(map(len, groups))} ranks are left and the model needs {least}: resume when there are more"
        )
    while any(len(group) < least for group in groups):
        small = min(groups, key=len)
        large = max(groups, key=len)
        if len(large) > least:
            small.append(large.pop())
        else:
            groups.remove(small)
            min(groups, key=len).extend(small)
    return groups


def claim(lab: Laboratory) -> Measured:
    """A rank of each pipeline dies; templates of fewer nodes go on along the undisturbed losses."""
    from mycel.pretrain.drill import drilled
    from mycel.pretrain.drill_rank import Drill

    undisturbed = drilled(Drill("oobleck", ranks=5))
    killed = drilled(Drill("oobleck", ranks=5, deaths=((1, 1, "backward", 1), (4, 3, "exchange", 1))))
    apart = killed.apart(undisturbed)
    return Measured(
        f"ranks 1 and 3 of 5, in pipelines of 3 and 2, killed at steps 1 and 4: losses at most {apart:.1e} (relative) "
        f"from an undisturbed run's, {killed.survivors} processes never restarted, {killed.copied} units copied, "
        f"{killed.lost_steps} steps lost",
        apart < 1e-6 and killed.survivors == 3 and killed.copied > 0 and killed.lost_steps == 0,
        {"apart": apart, "copied": killed.copied, "recovery_seconds": max(killed.seconds)},
    )
