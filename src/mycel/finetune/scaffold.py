"""SCAFFOLD: control variates tell each party how its own direction differs from everyone's, and take that out.

Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning" (its option II); as one of
the seven rules of Ye et al. 2024, "OpenFedLLM" (catalogue number 21), whose form for any local optimiser is used: the
correction is a step of its own after the optimiser's, and so does not pass through Adam's scaling.

    party k:      H times: w <- optimiser(w) - rate * (c - c_k)
                  c_k+ = (w_t - w_k) / (H * rate) - (c - c_k)      the mean direction of its own optimiser
                  sends w_k - w_t and c_k+ - c_k, and keeps c_k+
    coordinator:  w_{t+1} as federated averaging;   c <- c + sum_k (c_k+ - c_k) / K   over those who answered

``rate`` is the local learning rate and K counts all parties, so c stays the mean of the c_k. All control variates
begin at zero, so the first round is that of federated averaging, and a lonely party is never corrected. An answer
that is lost after its party has moved c_k, or coded with loss, leaves c behind by that much. A variate carries the
noise of H batches: where noise outweighs what parties differ by, as with few steps of Adam, agreement falls instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mycel.finetune.fedavg import FedAvg
from mycel.rounds.checking import check_shapes
from mycel.rounds.drift import Drift
from mycel.rounds.laboratory import Measured
from mycel.rounds.system import Answer, Outcome, State
from mycel.wire.algebra import add, group, scale, subtract, with_role
from mycel.wire.parcel import Parcel, Tensors

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.party import Party
    from mycel.rounds.world import World


class Scaffold(FedAvg):
    """Federated averaging whose local steps are corrected by control variates."""

    leaves = ("update", "control")

    def begin(self, world: World) -> State:
        """Start from the trainable's initial state, with a control variate of zero."""
        state = super().begin(world)
        return state.but(server=_zeros(state.shared), facts={"parties": len(world.nodes)})

    def brief(self, state: State, node: int) -> Parcel:
        """Tell the node the shared state and everyone's direction."""
        plain = super().brief(state, node)
        return Parcel(plain.kind, plain.header, plain.tensors | with_role("control", self.cut(state.server, node)))

    def inspect(self, state: State, node: int, answer: Parcel) -> None:
        """Refuse a control variate that does not fit the state."""
        wanted = {name: tuple(tensor.shape) for name, tensor in self.cut(state.server, node).items()}
        check_shapes(group(answer.tensors, "control"), wanted)

    def work(self, brief: Parcel, party: Party) -> Parcel:
        """Train with the difference of directions taken out, and renew the party's own."""
        start, rate = group(brief.tensors, "shared"), self.recipe.training.learning_rate
        own = group(party.personal, "control") or _zeros(start)
        difference = subtract(group(brief.tensors, "control"), own)

        @torch.no_grad()
        def steer(parameters: Mapping[str, nn.Parameter]) -> None:
            for name, parameter in parameters.items():
                parameter.sub_(difference[name], alpha=rate)

        trainable = self.adopt(brief, party)
        result = party.train(trainable, after=steer)
        update = subtract(trainable.state(), start)
        renewed = subtract(scale(update, -1 / (result.steps * rate)), difference)
        party.personal |= with_role("control", renewed)
        return party.answer(result.loss, update, control=subtract(renewed, own))

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        """Average the changes by sample count; add up the control variates' changes over the number of parties."""
        moved = _zeros(state.server)
        for answer in answers:
            change = self.padded(answer.tensors("control"), state.server)
            moved = add(moved, change, 1 / state.facts["parties"])
        return Outcome(shared=super().combine(state, answers).shared, server=moved)

    def step(self, state: State, outcome: Outcome) -> State:
        """Move the shared state and everyone's direction."""
        return super().step(state, outcome).but(server=add(state.server, outcome.server))


def _zeros(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def claim(lab: Laboratory) -> Measured:
    """Once control variates are known, the changes of one round point closer the same way than FedAvg's.

    Parties step with plain gradients, as in SCAFFOLD's own analysis.
    """
    changes: dict[str, Any] = {"rounds.count": 3, "rounds.local_steps": 10, "rounds.evaluate_every": 3}
    changes |= {"training.optimizer": "sgd", "training.learning_rate": 0.1, "training.clip_norm": 0.0}
    free, steered = Drift(), Drift()
    lab.run(lab.recipe("fedavg", changes), watch=free)
    lab.run(lab.recipe("scaffold", changes), watch=steered)
    # In the first round nothing is corrected yet.
    gains = [after - before for after, before in zip(steered.agreements[1:], free.agreements[1:], strict=True)]
    text = " and ".join(
        f"{after:.3f} against {before:.3f}"
        for after, before in zip(steered.agreements[1:], free.agreements[1:], strict=True)
    )
    return Measured(
        f"mean cosine of parties' changes {text} with FedAvg, in rounds 2 and 3", min(gains) > 0, {"gain": min(gains)}
    )
