"""FlexLoRA: parties of unlike ranks are averaged at full size, and each is sent the best approximation of its rank.

Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources"
(catalogue number 95).

    party k:      B_k, A_k of its own rank r_k after local training
    coordinator:  D = sum_k p_k B_k A_k = U S V^T   per layer
    brief to k:   B = U[:, :r_k] S[:r_k],   A = V[:, :r_k]^T

By Eckart and Young no matrix of rank r_k lies nearer to D, and the distance is the norm of the singular values left
out; so parties of high rank are not held back by those of low rank. D is never formed: with the factors side by side,
``[p_1 B_1 ...] = Q_B R_B`` and ``[A_1; ...]^T = Q_A R_A``, the singular values of D are those of the small
``R_B R_A^T``.

Knobs: ``split`` puts S on B (as in the paper) or its root on both factors; the product is the same. With one party
FlexLoRA is local training up to a change of factors.

Two choices of ours: the coordinator keeps the largest rank that any party has, so what lies beyond it is dropped each
round; and the shared A joins the stack with weight zero, so directions that no answer fills keep a live row of A. How
the paper treats these two cases could not be verified, nor how it maps a party's budget to its rank; here the recipe
lists the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mycel.finetune.fedavg import FedAvg
from mycel.recipe.schema import Recipe
from mycel.rounds.effective import aggregation_errors
from mycel.rounds.factors import layers, require_lora
from mycel.rounds.laboratory import Measured
from mycel.rounds.party import rank_of
from mycel.rounds.system import Answer, Knobs, Outcome, State
from mycel.wire.algebra import resize_rank
from mycel.wire.parcel import Parcel, Tensors

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.party import Party

RANKS = [1, 2, 4, 8, 16, 32]


class FlexLoraKnobs(Knobs):
    """Settings of FlexLoRA."""

    split: Literal["up", "even"] = Field("up", description="where singular values go: all on B, or the root on both")


class FlexLora(FedAvg):
    """Average the products, redistribute by singular value decomposition."""

    Knobs = FlexLoraKnobs

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        require_lora(recipe)

    def work(self, brief: Parcel, party: Party) -> Parcel:
        """Train and send both factors themselves: a change of factors says nothing about their product."""
        trainable = self.adopt(brief, party)
        result = party.train(trainable)
        return party.answer(result.loss, trainable.state())

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        """Decompose the mean product at the largest rank; smaller ranks are its leading part."""
        ordered = sorted(answers, key=lambda answer: answer.node)
        total = sum(answer.weight for answer in ordered)
        states = [(answer.weight / total, answer.tensors()) for answer in ordered]
        rank = rank_of(self.recipe, -1) or 1
        shared: Tensors = {}
        for path in layers(state.shared):
            down, up = f"{path}.lora_A", f"{path}.lora_B"
            stacked_a = torch.cat([*(own[down] for _, own in states), state.shared[down]])
            stacked_b = torch.cat(
                [*(weight * own[up] for weight, own in states), torch.zeros_like(state.shared[up])], 1
            )
            left, values, right = product_svd(stacked_b, stacked_a)
            on_b, on_a = (values, torch.ones_like(values)) if self.knobs.split == "up" else (values.sqrt(),) * 2
            shared[up] = (left * on_b).to(state.shared[up].dtype)
            shared[down] = (on_a[:, None] * right).to(state.shared[down].dtype)
        return Outcome(shared=resize_rank(shared, rank))

    def step(self, state: State, outcome: Outcome) -> State:
        """Take the new factors."""
        return state.but(shared=outcome.shared)


def product_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition of ``up @ down`` without forming the product.

    Parameters
    ----------
    up : Tensor
        Of shape (outputs, rank).
    down : Tensor
        Of shape (rank, inputs).

    Returns
    -------
    tuple of Tensor
        ``U`` (outputs, n), ``S`` (n,) in falling order, ``V^T`` (n, inputs); double precision, n the least of the
        three sizes.
    """
    left_basis, left_core = torch.linalg.qr(up.double())
    right_basis, right_core = torch.linalg.qr(down.double().T)
    left, values, right = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return left_basis @ left, values, right @ right_basis.T


def claim(lab: Laboratory) -> Measured:
    """Ranks 1 to 32 lose little where padding with zeros loses much, and end lower than it and than rank 1 for all."""
    mixed: dict[str, Any] = {"trainable.rank": RANKS, "rounds.evaluate_every": 100}
    errors = {name: max(aggregation_errors(lab.world(lab.recipe(name, mixed)), 2)) for name in ("flexlora", "fedavg")}
    arms = {"flexible": ("flexlora", RANKS), "padded": ("fedavg", RANKS), "least": ("fedavg", min(RANKS))}
    gains: dict[str, list[float]] = {"padded": [], "least": []}
    for seed in (1, 2):
        loss = {
            arm: lab.run(lab.recipe(name, {**mixed, "trainable.rank": ranks, "seed": seed})).loss()
            for arm, (name, ranks) in arms.items()
        }
        for arm, found in gains.items():
            found.append(loss[arm] - loss["flexible"])
    text = {arm: ", ".join(f"{gain:.3f}" for gain in found) for arm, found in gains.items()}
    return Measured(
        f"aggregation error {errors['flexlora']:.3f} against {errors['fedavg']:.2f} with zero-padding; loss lower than "
        f"zero-padding's by {text['padded']} and than rank 1's for everyone by {text['least']} nats (seeds 1, 2)",
        errors["flexlora"] < 0.5 * errors["fedavg"] and min(*gains["padded"], *gains["least"]) > 0,
        {
            "error": errors["flexlora"],
            "padding_error": errors["fedavg"],
            "least_gain": min(gains["padded"]),
            "least_gain_over_rank_1": min(gains["least"]),
        },
    )
