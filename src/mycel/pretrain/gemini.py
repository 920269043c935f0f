"""Gemini (Wang et al. 2023): checkpoints in the memory of other machines, sent between training's own messages.

    placement: m copies of every rank's state, its own among them: groups of m, and a ring of those that fill no group
    a step:    the state after step t is copied, and travels in 2 M messages between the M pieces of step t + 1
    a death:   a new process takes the place; all go back to the newest version of which every state is left, in their
               own memory or a peer's, and train on; only when all copies of a state are gone is the disk asked

A rank keeps two versions, as a newer one may be complete only at some. The paper schedules the messages into profiled
idle times of the network; here each follows a piece of work and is waited for at the step's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from mycel.collectives.formation import Formation, Recovery, even
from mycel.decisions.replicas import Machines, Mixed
from mycel.rounds.laboratory import Measured

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory


@dataclass(frozen=True)
class Gemini(Recovery):
    """Copies in memory.

    Parameters
    ----------
    units, pieces, size : int
        Of the chain, of a step's batch, and ranks.
    copies : int
        Of each rank's state, its own among them: m.
    pipelines : int
        Among which ranks and pieces are shared out.
    """

    units: int
    pieces: int
    size: int
    copies: int = 2
    pipelines: int = 1

    replaces = True

    def formation(self, epochs: Sequence[Sequence[int]]) -> Formation:
        """Return the first formation: whoever dies is replaced."""
        edges = [self.size * place // self.pipelines for place in range(self.pipelines + 1)]
        ways = tuple(even(self.units, epochs[0][first:last]) for first, last in pairwise(edges))
        edges = [self.pieces * place // self.pipelines for place in range(self.pipelines + 1)]
        return Formation(ways, tuple(tuple(range(first, last)) for first, last in pairwise(edges)))

    def keepers(self, member: int) -> tuple[int, ...]:
        """Other members that keep this one's copy."""
        held = Mixed().decide(Machines(self.size, self.copies))[member]
        return tuple(sorted(held - {member}))


def claim(lab: Laboratory) -> Measured:
    """Killed and replaced, from memory and from disk: the same losses; memory loses at most one step."""
    from mycel.pretrain.drill import drilled
    from mycel.pretrain.drill_rank import Drill

    undisturbed = drilled(Drill("gemini", steps=9))
    death = ((7, 2, "backward", 1),)
    memory = drilled(Drill("gemini", steps=9, deaths=death))
    disk = drilled(Drill("restart", steps=9, deaths=death, save_every=4))
    apart = max(memory.apart(undisturbed), disk.apart(undisturbed))
    lost, baseline = memory.lost(undisturbed), disk.lost(undisturbed)
    return Measured(
        f"rank 2 of 4 killed at step 7: losses at most {apart:.1e} (relative) from the undisturbed run's; from peers' "
        f"memory {memory.lost_steps} step and {lost:.2f} s lost, by a restart from a checkpoint on disk every 4 steps "
        f"{disk.lost_steps} steps and {baseline:.2f} s",
        apart < 1e-6 and memory.lost_steps <= 1 < disk.lost_steps and lost < baseline,
        {"apart": apart, "memory_seconds": lost, "disk_seconds": baseline},
    )
