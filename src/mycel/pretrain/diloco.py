"""DiLoCo: islands train alone for many steps; every now and then their mean change is a step of an outer optimiser.

Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language Models".

    island k:      w_k = H steps of AdamW from w_t;   d_k = w_k - w_t   (the outer gradient is -d_k)
    coordinator:   d = mean_k d_k;   b <- mu b + d;   w_{t+1} = w_t + rate * (d + mu b)          (Nesterov)

``H`` is ``rounds.local_steps``. With ``outer_momentum = 0`` and ``outer_rate = 1`` this is federated averaging; with
plain SGD at the islands and ``H = 1`` besides, it is data parallelism. The inner optimiser's memory stays at the island
between rounds (``inner = "kept"``) or is forgotten ("fresh", Photon's stateless islands).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from mycel.pretrain.weights import Pretraining, PretrainKnobs, island_batches, train_on
from mycel.rounds.laboratory import Measured
from mycel.rounds.system import Answer, Knobs, Outcome, State
from mycel.wire.algebra import add, group, scale, subtract, weighted_mean, with_role
from mycel.wire.parcel import Parcel, Tensors

if TYPE_CHECKING:
    from mycel.models.trainable import Trainable
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.party import Party


class DiLoCoKnobs(PretrainKnobs):
    """Settings of DiLoCo."""

    outer_rate: float = Field(0.7, gt=0, description="step along the mean change")
    outer_momentum: float = Field(0.8, ge=0, lt=1, description="mu of Nesterov's momentum; 0: plain averaging")
    inner: Literal["kept", "fresh"] = Field("kept", description="what becomes of the inner optimiser's memory")


class DiLoCo(Pretraining):
    """Local AdamW, outer Nesterov."""

    Knobs: ClassVar[type[Knobs]] = DiLoCoKnobs
    paces = ("synchronous",)

    def work(self, brief: Parcel, party: Party) -> Parcel:
        """Train alone and send the change."""
        start = group(brief.tensors, "shared")
        trainable = self.adopt(brief, party)
        loss = self.train(party, trainable, self.steps_of(brief))
        return party.answer(loss, subtract(trainable.state(), start))

    def steps_of(self, brief: Parcel) -> int:
        """How long this island works alone."""
        return int(brief.header.get("steps", self.recipe.rounds.local_steps))

    def train(self, party: Party, trainable: Trainable, steps: int) -> float:
        """Take the island's next steps, by its own count of them, and return their mean loss."""
        done = int(party.personal.get("steps", torch.zeros((), dtype=torch.int64)))
        memory = group(party.personal, "memory") if self.knobs.inner == "kept" else {}
        batches = island_batches(party, done, steps)
        begun = self.begun(party, done)
        result, memory = train_on(party, trainable, batches, lambda index: self.rate(begun + index), memory)
        party.personal.clear()
        party.personal["steps"] = torch.tensor(done + steps)
        if self.knobs.inner == "kept":
            party.personal.update(with_role("memory", memory))
        return result.loss

    def begun(self, party: Party, done: int) -> int:
        """Where on the schedule of rates this round begins: the same for islands that sat out a round."""
        return party.version * self.recipe.rounds.local_steps

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        """Average the islands' changes, one island one voice."""
        return Outcome(shared=mean_change(answers))

    def step(self, state: State, outcome: Outcome) -> State:
        """Step along the mean change with Nesterov's momentum."""
        shared, velocity = nesterov(
            state.shared, state.server, outcome.shared, self.knobs.outer_rate, self.knobs.outer_momentum
        )
        return state.but(shared=shared, server=velocity)


def mean_change(answers: Sequence[Answer]) -> Tensors:
    """Mean of the answers' changes, whatever their order."""
    ordered = sorted(answers, key=lambda answer: answer.node)
    return weighted_mean([answer.tensors() for answer in ordered], [1.0] * len(ordered))


def nesterov(
    weights: Tensors, velocity: Tensors, change: Tensors, rate: float, momentum: float
) -> tuple[Tensors, Tensors]:
    """Return weights and velocity after a step of torch's Nesterov rule, with ``-change`` as the gradient."""
    if not momentum:
        return add(weights, change, rate), {}
    velocity = add(scale(velocity, momentum), change) if velocity else change
    return add(weights, add(change, velocity, momentum), rate), velocity


def claim(lab: Laboratory) -> Measured:
    """With 64 local steps: a sixtieth of the synchronous bytes, and a final loss within 3 % at equal tokens."""
    from mycel.pretrain.proving import pretraining, training_bytes

    alone = lab.run(lab.recipe("diloco", pretraining({"rounds.count": 8, "rounds.local_steps": 64})))
    steps = {"rounds.count": 512, "rounds.evaluate_every": 1024}
    together = lab.run(lab.recipe("synchronous", pretraining(steps)))
    ratio = training_bytes(together) / training_bytes(alone)
    excess = alone.loss() / together.loss() - 1
    return Measured(
        f"{training_bytes(alone) / 1e6:.1f} MB against {training_bytes(together) / 1e6:.0f} MB ({ratio:.1f} times "
        f"less); loss {alone.loss():.3f} against {together.loss():.3f} ({excess:+.1%}) after 512 steps of 4 islands",
        ratio >= 60 and excess <= 0.03,
        {"ratio": ratio, "excess": excess, "loss": alone.loss(), "loss_synchronous": together.loss()},
    )
