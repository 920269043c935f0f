"""FedAvg: the coordinator sends the shared state, parties train it at home, and the mean change moves it.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data"; for instruction
tuning with LoRA: Ye et al. 2024, "OpenFedLLM" (catalogue number 21).

    party k:      w_k = local training from w_t;   d_k = w_k - w_t
    coordinator:  w_{t+1} = w_t + server_rate * sum_k p_k d_k,   p_k = n_k / sum n

With one party and ``server_rate = 1`` this is plain local training. Parties of unlike LoRA ranks are sent the leading
rows and columns of the shared factors, and their changes are padded with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mycel.rounds.laboratory import Measured
from mycel.rounds.party import rank_of
from mycel.rounds.system import Answer, Knobs, Outcome, State, System
from mycel.wire.algebra import add, group, resize_rank, subtract, weighted_mean, with_role
from mycel.wire.parcel import Parcel, Tensors

if TYPE_CHECKING:
    from mycel.models.trainable import Trainable
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.party import Party
    from mycel.rounds.training import Correction
    from mycel.rounds.world import World


class FedAvgKnobs(Knobs):
    """Settings of federated averaging."""

    server_rate: float = Field(1.0, gt=0, description="step along the mean change")


class FedAvg(System):
    """Federated averaging over any trainable; the plain system that the others vary."""

    Knobs: ClassVar[type[Knobs]] = FedAvgKnobs
    needs = "sum"
    separable = True

    def begin(self, world: World) -> State:
        """Start from the trainable's initial state, or from the adapter that the recipe names."""
        return State(shared=world.starting_state())

    def brief(self, state: State, node: int) -> Parcel:
        """Tell the node the shared state, cut to its rank."""
        return Parcel("work", {}, with_role("shared", self.cut(state.shared, node)))

    def adopt(self, brief: Parcel, party: Party) -> Trainable:
        """Load the shared state."""
        trainable = party.trainable()
        trainable.load(group(brief.tensors, "shared"))
        return trainable

    def work(self, brief: Parcel, party: Party) -> Parcel:
        """Train from the shared state and send the change."""
        trainable = self.adopt(brief, party)
        result = party.train(trainable, correct=self.correction(brief, party))
        return party.answer(result.loss, subtract(trainable.state(), group(brief.tensors, "shared")))

    def correction(self, brief: Parcel, party: Party) -> Correction | None:
        """Return what is done to each local gradient; nothing here."""
        return None

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        """Average the changes by sample count, padded to the shared rank."""
        updates = (self.padded(answer.tensors(), state.shared) for answer in answers)
        return Outcome(shared=weighted_mean(updates, [answer.weight for answer in answers]))

    def step(self, state: State, outcome: Outcome) -> State:
        """Move along the mean change."""
        return state.but(shared=add(state.shared, outcome.shared, self.knobs.server_rate))

    def cut(self, shared: Tensors, node: int) -> Tensors:
        """Return the part of the shared state that a node of its rank trains."""
        rank = rank_of(self.recipe, node)
        return shared if rank is None else resize_rank(shared, rank)

    @staticmethod
    def padded(update: Tensors, shared: Tensors) -> Tensors:
        """Return ``update`` in the shapes of the shared state."""
        ranks = [tensor.shape[0] for name, tensor in shared.items() if name.endswith("lora_A")]
        return resize_rank(update, ranks[0]) if ranks else update


def claim(lab: Laboratory) -> Measured:
    """Federated tuning beats the mean of parties' tuning alone, on everyone's held-out examples, on three seeds."""
    gains = []
    for seed in (1, 2, 3):
        together = lab.run(lab.recipe("fedavg", {"seed": seed}))
        steps = {"rounds.count": 1, "rounds.local_steps": 20}
        alone = lab.run(lab.recipe("local", {"seed": seed, **steps}))
        gains.append(lab.mixture(alone) - lab.mixture(together))
    text = ", ".join(f"{gain:.3f}" for gain in gains)
    return Measured(
        f"loss on the mixture is lower than alone by {text} nats (seeds 1, 2, 3)",
        min(gains) > 0,
        {"least_gain": min(gains)},
    )
