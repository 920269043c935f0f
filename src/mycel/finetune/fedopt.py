"""Server optimisers: the parties' mean change is a pseudo-gradient, and the coordinator steps along it with a rule.

Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification"
(FedAvgM); Reddi et al. 2021, "Adaptive Federated Optimization" (FedAdagrad, FedYogi, FedAdam); in the forms of Ye et
al. 2024, "OpenFedLLM" (catalogue number 21). With D_t the mean change, and D_t^2, sqrt and / entry by entry:

    FedAvgM      v_1 = D_1;  v_t = b1 v_{t-1} + (1 - b1) D_t;  w += rate * v_t        D_t weighed by sample count
    FedAdagrad   m_t = D_t;                          u += m_t^2
    FedYogi      m_1 = D_1; m_t as v_t above;        u -= (1 - b2) m_t^2 sign(u - m_t^2)
    FedAdam      m_1 = D_1; m_t as v_t above;        u  = b2 u + (1 - b2) m_t^2
                 these three: u_0 = tau^2,  w += rate * m_t / (sqrt(u) + tau)         D_t counts parties alike

The first mean is not shortened by ``1 - b1``, and u is fed by the smoothed m_t, where Reddi's published algorithm
takes D_t: both as in OpenFedLLM. FedAvgM with ``momentum = 0`` is federated averaging. Where changes are much larger
than tau, an adaptive step does not depend on their scale: ``rate`` is a length. An entry moves by at most ``rate`` in
a round with FedAdagrad, and by at most ``rate / sqrt(1 - b2)`` with the others, whose u starts low.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from mycel.finetune.fedavg import FedAvg, FedAvgKnobs
from mycel.rounds.laboratory import Measured, Trail
from mycel.rounds.system import Answer, Knobs, Outcome, State
from mycel.wire.algebra import add, cosine, discount, group, norm, scale, weighted_mean, with_role
from mycel.wire.parcel import Tensors

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory


class FedAvgMKnobs(FedAvgKnobs):
    """Settings of FedAvgM."""

    momentum: float = Field(0.9, ge=0, lt=1, description="b1, share of the old velocity that is kept")


class FedAvgM(FedAvg):
    """Federated averaging along a running mean of the rounds' changes."""

    Knobs = FedAvgMKnobs

    def step(self, state: State, outcome: Outcome) -> State:
        """Move along the velocity."""
        velocity = smoothed(state.server, outcome.shared, self.knobs.momentum)
        return super().step(state, Outcome(shared=velocity)).but(server=velocity)


class AdagradKnobs(Knobs):
    """Settings of FedAdagrad."""

    server_rate: float = Field(1e-3, gt=0, description="eta, length of a step where changes exceed tau")
    tau: float = Field(1e-3, gt=0, description="size of an entry's change below which its step is shortened")


class MomentKnobs(AdagradKnobs):
    """Settings of FedYogi and FedAdam."""

    beta1: float = Field(0.9, ge=0, lt=1, description="share of the old mean change that is kept")
    beta2: float = Field(0.99, ge=0, lt=1, description="share of the old mean square that is kept")


class FedAdagrad(FedAvg):
    """Steps shortened, entry by entry, by all that an entry has ever moved."""

    Knobs = AdagradKnobs

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        """Average the changes with one weight for all; only staleness discounts."""
        updates = (self.padded(answer.tensors(), state.shared) for answer in answers)
        weights = [discount(answer.staleness, self.recipe.rounds.staleness) for answer in answers]
        return Outcome(shared=weighted_mean(updates, weights))

    def step(self, state: State, outcome: Outcome) -> State:
        """Move each entry by its mean change over the root of its mean square."""
        mean = self.mean(group(state.server, "mean"), outcome.shared)
        square = group(state.server, "square")
        moved, squares = {}, {}
        for name, change in mean.items():
            before = square[name] if square else torch.full_like(change, self.knobs.tau**2)
            squares[name] = self.accumulated(before, change.square())
            moved[name] = change / (squares[name].sqrt() + self.knobs.tau)
        server = with_role("mean", mean) | with_role("square", squares)
        return state.but(shared=add(state.shared, moved, self.knobs.server_rate), server=server)

    def mean(self, before: Tensors, change: Tensors) -> Tensors:
        """Return the direction; here the round's own."""
        return change

    def accumulated(self, before: Tensor, square: Tensor) -> Tensor:
        """Return the mean square after a round; here the sum of all."""
        return before + square


class FedAdam(FedAdagrad):
    """Running means of the change and of its square."""

    Knobs = MomentKnobs

    def mean(self, before: Tensors, change: Tensors) -> Tensors:
        """Return the running mean of the changes."""
        return smoothed(before, change, self.knobs.beta1)

    def accumulated(self, before: Tensor, square: Tensor) -> Tensor:
        """Forget the old square by a constant share."""
        return torch.lerp(square, before, self.knobs.beta2)


class FedYogi(FedAdam):
    """As FedAdam, but the mean square moves by no more than the new square, and so forgets slowly."""

    def accumulated(self, before: Tensor, square: Tensor) -> Tensor:
        """Move the old square towards the new one by a share of the new one."""
        toward: Tensor = torch.sign(square - before) * square
        return torch.add(before, toward, alpha=1 - self.knobs.beta2)


def smoothed(before: Tensors, change: Tensors, kept: float) -> Tensors:
    """Running mean that begins with the first change as it is."""
    return add(scale(before, kept), change, 1 - kept) if before else change


def claim_momentum(lab: Laboratory) -> Measured:
    """With half the parties a round, successive server steps agree more than FedAvg's; the end beats tuning alone.

    The velocity is kept by a half, since the usual 0.9 looks back further than these six rounds.
    """
    changes = {"rounds.count": 6, "rounds.cohort": 0.5, "rounds.evaluate_every": 100}
    lab.run(lab.recipe("fedavg", changes), watch=(plain := Trail()))
    finished = lab.run(lab.recipe("fedavgm", {**changes, "knobs": {"momentum": 0.5}}), watch=(steady := Trail()))
    zigzag, straight = (
        fmean(cosine(before, after) for before, after in pairwise(trail.steps())) for trail in (plain, steady)
    )
    loss, alone = lab.mixture(finished), _alone(lab, {"rounds.local_steps": 15})
    return Measured(
        f"mean cosine of successive server steps {straight:.3f} against FedAvg's {zigzag:.3f}; "
        f"loss on the mixture {loss:.4f}, alone {alone:.4f}",
        straight > zigzag and loss < alone,
        {"straight": straight, "zigzag": zigzag, "loss": loss, "alone": alone},
    )


PLAIN_PARTIES = {
    "training.optimizer": "sgd",
    "training.learning_rate": 0.5,
    "training.batch_size": 4,
    "rounds.evaluate_every": 100,
}


def claim_adagrad(lab: Laboratory) -> Measured:
    """Server steps shorten from round to round, more than FedAvg's; the end beats tuning alone (plain SGD at home)."""
    finished = lab.run(
        lab.recipe("fedadagrad", {**PLAIN_PARTIES, "knobs": {"server_rate": 0.01}}), watch=(own := Trail())
    )
    lab.run(lab.recipe("fedavg", PLAIN_PARTIES), watch=(plain := Trail()))
    shrunk, kept = (norm(trail.steps()[-1]) / norm(trail.steps()[0]) for trail in (own, plain))
    loss, alone = lab.mixture(finished), _alone(lab, PLAIN_PARTIES | {"rounds.local_steps": 20})
    return Measured(
        f"the fourth server step is {shrunk:.2f} of the first, FedAvg's {kept:.2f}; "
        f"loss on the mixture {loss:.4f}, alone {alone:.4f}",
        shrunk < kept and loss < alone,
        {"shrunk": shrunk, "kept": kept, "loss": loss, "alone": alone},
    )


def claim_adam(lab: Laboratory) -> Measured:
    """A tenfold smaller step at the parties changes the outcome less than FedAvg's; the end beats tuning alone.

    So that changes exceed it at either step, tau is 1e-5.
    """
    changes = PLAIN_PARTIES | {"rounds.count": 3}
    spread, losses = {}, []
    for name, knobs in (("fedavg", {}), ("fedadam", {"tau": 1e-5})):
        ends = []
        for rate in (0.5, 0.05):
            recipe = lab.recipe(name, {**changes, "training.learning_rate": rate, "knobs": knobs})
            ends.append(lab.mixture(lab.run(recipe)))
        spread[name], losses = abs(ends[0] - ends[1]), ends
    alone = _alone(lab, changes | {"rounds.local_steps": 15})
    return Measured(
        f"parties' rates 0.5 and 0.05 end {spread['fedadam']:.4f} nats apart, with FedAvg {spread['fedavg']:.4f}; "
        f"loss on the mixture {losses[0]:.4f}, alone {alone:.4f}",
        spread["fedadam"] < spread["fedavg"] and losses[0] < alone,
        {"spread": spread["fedadam"], "spread_fedavg": spread["fedavg"], "loss": losses[0], "alone": alone},
    )


def claim_yogi(lab: Laboratory) -> Measured:
    """Less of the mean square is forgotten than with FedAdam; the end beats tuning alone (plain SGD at home)."""
    forgotten, losses = {}, {}
    for name in ("fedadam", "fedyogi"):
        recipe = lab.recipe(name, {**PLAIN_PARTIES, "knobs": {"server_rate": 0.005}})
        losses[name] = lab.mixture(lab.run(recipe, watch=(trail := Trail())))
        forgotten[name] = _forgotten([group(state.server, "square") for state in trail.states[1:]])
    alone = _alone(lab, PLAIN_PARTIES | {"rounds.local_steps": 20})
    return Measured(
        f"{forgotten['fedyogi']:.2%} of the mean square is forgotten in a round, with FedAdam "
        f"{forgotten['fedadam']:.2%}; loss on the mixture {losses['fedyogi']:.4f}, alone {alone:.4f}",
        forgotten["fedyogi"] < forgotten["fedadam"] and losses["fedyogi"] < alone,
        {"forgotten": forgotten["fedyogi"], "forgotten_adam": forgotten["fedadam"], "loss": losses["fedyogi"]},
    )


def _alone(lab: Laboratory, changes: dict[str, Any]) -> float:
    return lab.mixture(lab.run(lab.recipe("local", {**changes, "rounds.count": 1})))


def _forgotten(squares: Sequence[Tensors]) -> float:
    """Share of the mean squares that falls away in a round, over all entries and rounds together."""
    fallen, held = 0.0, 0.0
    for before, after in pairwise(squares):
        fallen += sum(float((tensor - after[name]).clamp(min=0).sum()) for name, tensor in before.items())
        held += sum(float(tensor.sum()) for tensor in before.values())
    return fallen / held
