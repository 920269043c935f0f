"""Each party alone: the baseline that a federation has to beat.

Every party trains its own state and nothing is combined, so the outcome is a state for each party. It is what a
multi-task system becomes when its parties are not tied to one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mycel.finetune.fedavg import FedAvg
from mycel.rounds.laboratory import Measured
from mycel.rounds.system import Answer, Outcome, State
from mycel.wire.algebra import add, norm, subtract, weighted_mean, with_role
from mycel.wire.parcel import Parcel

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory


class Local(FedAvg):
    """Parties that share a starting point and nothing else."""

    def brief(self, state: State, node: int) -> Parcel:
        """Tell the node its own state."""
        own = state.parties.get(node, state.shared)
        return Parcel("work", {}, with_role("shared", self.cut(own, node)))

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        """Keep each party's change apart."""
        return Outcome(parties={answer.node: answer.tensors() for answer in answers})

    def step(self, state: State, outcome: Outcome) -> State:
        """Move each party's own state."""
        moved = {
            node: add(state.parties.get(node, self.cut(state.shared, node)), change)
            for node, change in outcome.parties.items()
        }
        return state.but(parties={**state.parties, **moved})


def claim(lab: Laboratory) -> Measured:
    """With one round, FedAvg's answers and the lonely ones are the same: only combining tells the two apart."""
    once = {"rounds.count": 1}
    alone, together = lab.run(lab.recipe("local", once)), lab.run(lab.recipe("fedavg", once))
    states = list(alone.state.parties.values())
    gap = subtract(weighted_mean(states, [node.samples for node in alone.world.nodes]), together.state.shared)
    distance = norm(gap) / norm(together.state.shared)
    return Measured(
        f"the mean of the lonely states lies {distance:.1e} (relative) from FedAvg's after one round",
        distance < 1e-5,
        {"distance": distance},
    )
