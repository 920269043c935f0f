"""FedMeZO: federated averaging whose local steps are forward passes only.

Ling et al. 2024, "On the Convergence of Zeroth-Order Federated Tuning for Large Language Models" (KDD; catalogue
number 17). Every local step draws a direction from a seed and moves along it by its slope; the trained state, LoRA in
the paper, is exchanged whole and averaged as in FedAvg.

    step:   g = [L(w + mu z) - L(w - mu z)] / 2 mu,   w <- w - eta_k g z,   z ~ N(0, I)
    party:  eta_k = eta_0 (1 + spread Phi_k),   Phi_k = (s_k - mean s) / max_j |s_j - mean s|   in [-1, 1]

The signal s_k is how far party k's last change lies from the mean change, summed over tensors, or its training loss
averaged over past rounds; a deviating party takes longer steps. eta_0 is ``training.learning_rate``, mu
``training.perturbation``. The coordinator computes Phi from answers it has anyway and sends one number back.

With ``signal = "none"``, or a single party, this is FedAvg with two-point estimates, to the bit. The paper's settings
are 30 steps of one example, eta_0 = 1e-5, mu = 1e-3 and LoRA of rank 128; steps of that length do little here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from mycel.finetune.fedavg import FedAvg, FedAvgKnobs
from mycel.models.footprint import peak_bytes
from mycel.rounds.gradients import backpropagation, two_point, walk
from mycel.rounds.laboratory import Measured
from mycel.rounds.replay import require_forward_passes
from mycel.rounds.system import Answer, Outcome, State
from mycel.rounds.training import batch_loss
from mycel.wire.algebra import norm, subtract, weighted_mean
from mycel.wire.parcel import Parcel

if TYPE_CHECKING:
    from mycel.recipe.schema import Recipe
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.party import Party
    from mycel.wire.parcel import Tensors


class FedMeZOKnobs(FedAvgKnobs):
    """Settings of FedMeZO."""

    signal: Literal["none", "loss", "model-difference"] = Field(
        "model-difference", description="what a party's learning rate follows"
    )
    spread: float = Field(0.5, ge=0, lt=1, description="largest relative change of a learning rate")
    window: int = Field(5, ge=1, description="rounds over which the training loss is averaged as a signal")


class FedMeZO(FedAvg):
    """Federated averaging by two-point estimates, at a learning rate for each party."""

    Knobs = FedMeZOKnobs

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        require_forward_passes(recipe, plain=False)

    def brief(self, state: State, node: int) -> Parcel:
        """Tell the node the shared state and, once there is one, its Phi."""
        brief = super().brief(state, node)
        phi = state.facts.get("phi", {}).get(str(node))
        return brief if phi is None else Parcel(brief.kind, {**brief.header, "phi": phi}, brief.tensors)

    def work(self, brief: Parcel, party: Party) -> Parcel:
        """Train at this party's own learning rate."""
        factor = 1 + self.knobs.spread * float(brief.header.get("phi", 0.0))
        rate = self.recipe.training.learning_rate * factor
        return super().work(brief, replace(party, recipe=party.recipe.replace({"training.learning_rate": rate})))

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        """Average, and note each party's signal."""
        outcome = super().combine(state, answers)
        changes = {answer.node: self.padded(answer.tensors(), state.shared) for answer in answers}
        losses = {answer.node: float(answer.parcel.header.get("loss", 0.0)) for answer in answers}
        return replace(outcome, facts=self._signals(state.facts, changes, losses))

    def step(self, state: State, outcome: Outcome) -> State:
        """Move, and remember what sets the learning rates."""
        return super().step(state, outcome).but(facts={**state.facts, **outcome.facts})

    def _signals(self, facts: dict[str, Any], changes: dict[int, Tensors], losses: dict[int, float]) -> dict[str, Any]:
        if self.knobs.signal == "none":
            return {}
        if self.knobs.signal == "model-difference":
            return {"phi": {**facts.get("phi", {}), **deviations(differences(changes))}}
        window = self.knobs.window
        past = dict(facts.get("losses", {}))
        for node, loss in losses.items():
            past[str(node)] = [*past.get(str(node), []), loss][-window:]
        ready = {int(node): fmean(seen) for node, seen in past.items() if len(seen) == window}
        return {"losses": past, "phi": {**facts.get("phi", {}), **deviations(ready)}}


def differences(changes: dict[int, Tensors]) -> dict[int, float]:
    """Return each party's distance from the mean change: Frobenius norms, summed over tensors."""
    order = sorted(changes)
    mean = weighted_mean([changes[node] for node in order], [1.0] * len(order))
    return {
        node: sum(norm({name: difference}) for name, difference in subtract(changes[node], mean).items())
        for node in order
    }


def deviations(signals: dict[int, float]) -> dict[str, float]:
    """Return Phi by node: the signal less its mean, scaled so that the largest magnitude is 1."""
    mean = fmean(signals.values()) if signals else 0.0
    largest = max((abs(signal - mean) for signal in signals.values()), default=0.0)
    return {str(node): (signal - mean) / largest if largest else 0.0 for node, signal in sorted(signals.items())}


def claim(lab: Laboratory) -> Measured:
    """Loss against first-order FedAvg at one learning rate, personal rates, and the memory of a step."""
    plain = {"training.optimizer": "sgd", "training.clip_norm": 0.0, "training.learning_rate": 0.01}
    small = {"model.base": "micro", "rounds.local_steps": 30, "training.batch_size": 4, "rounds.evaluate_every": 4}
    forward = {"training.gradient": "zeroth-order"}
    first = lab.run(lab.recipe("fedavg", {**plain, **small}))
    alike = lab.run(lab.recipe("fedmezo", {**plain, **small, **forward, "knobs": {"signal": "none"}}))
    personal = lab.run(lab.recipe("fedmezo", {**plain, **small, **forward}))
    estimated, exact, inference = step_bytes(lab, personal.world.recipe)
    return Measured(
        f"four rounds at one learning rate take the held-out loss from {first.loss(0):.4f} to {alike.loss():.4f}, and "
        f"first-order FedAvg to {first.loss():.4f}; personal learning rates end at {personal.loss():.4f}; a step's "
        f"peak is {estimated / inference:.2f} times inference, where back-propagation takes {exact / inference:.2f}",
        alike.loss() < first.loss() and estimated < 1.1 * inference,
        {
            "fedmezo": alike.loss(),
            "fedavg": first.loss(),
            "personal": personal.loss(),
            "memory": estimated / inference,
            "memory_first_order": exact / inference,
        },
    )


def step_bytes(lab: Laboratory, recipe: Recipe) -> tuple[int, int, int]:
    """Return the peak bytes of a two-point step, of a first-order step and of one forward pass, weights aside."""
    party = lab.world(recipe).site.party(0, 0)
    trainable, batch = party.trainable(), next(party.batches(1))
    parameters, model = trainable.parameters(), party.base.model
    trainable.load(party.initial(trainable))

    def estimate() -> None:
        slope, _ = two_point(lambda: batch_loss(model, batch), parameters, 1, recipe.training.perturbation)
        walk(parameters, 1, -recipe.training.learning_rate * slope)

    def infer() -> None:
        with torch.no_grad():
            batch_loss(model, batch)

    def descend() -> None:
        backpropagation(lambda: batch_loss(model, batch), parameters, 0)

    with trainable.active():
        return peak_bytes(estimate), peak_bytes(descend), peak_bytes(infer)
