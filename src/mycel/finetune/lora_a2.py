"""LoRA-A2: only one factor of LoRA moves at a time, and each party moves only the slices that matter to it.

Koo et al. 2024, "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous Clients" (catalogue
number 49).

*Alternating freeze.* In the 1st, 3rd, ... round A stands still and B is trained, in the 2nd, 4th, ... the other way
round (B first, for B = 0 leaves A without a gradient). The mean of the factor that moved is then exact.

*Adaptive rank selection.* All parties hold adapters of the largest rank r_G in the recipe; party k's own rank r_k is a
budget of ``r_k * (number of layers)`` slices. Each round it trains a little without restraint, scores every slice i
of every layer by the change it makes,

    |dB[:, i] A[i, :]|_F   or   |B[:, i] dA[i, :]|_F   (= the product of the two norms),

goes back to where it began, trains only the best slices over all layers together, and sends their changes and their
numbers. A layer may get none.

    coordinator:  F <- F + sum_k p_k dF_k,   F the factor that moved, p_k = n_k / sum n over all who answered

A slice that was not sent counts as a change of zero, not as absent. The download is the factor that moved last; the
other one a party still holds from the round before, and one that missed a round is sent both.

With a budget of r_G every slice is trained and only the alternation is left. Knobs: the budget where the recipe gives
one rank to all, the length of the probe (in the paper one epoch against five of training), and the ratio of B's
learning rate to A's, after LoRA+; which ratio the paper used could not be verified, so here a moderate 4. At this scale
the ratio is not a detail: with 1 in its place, alternation alone lies between FFA-LoRA and plain LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from mycel.errors import ParcelError
from mycel.finetune.fedavg import FedAvg
from mycel.recipe.schema import Recipe
from mycel.rounds.effective import aggregation_errors
from mycel.rounds.factors import factors_a, factors_b, is_a, layers, require_lora
from mycel.rounds.laboratory import Measured
from mycel.rounds.party import rank_of
from mycel.rounds.system import Answer, Knobs, Outcome, State
from mycel.wire.algebra import add, group, subtract, weighted_mean, with_role
from mycel.wire.codecs.topk import index_type
from mycel.wire.parcel import Parcel, Tensors

if TYPE_CHECKING:
    from mycel.models.trainable import Trainable
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.party import Party
    from mycel.rounds.world import World


class LoraA2Knobs(Knobs):
    """Settings of LoRA-A2."""

    budget: int = Field(2, ge=1, description="slices per layer for each party, where the recipe gives one rank to all")
    probe_steps: int = Field(1, ge=1, description="optimiser steps before slices are scored")
    ratio: float = Field(4.0, gt=0, description="learning rate of B over that of A, which is the recipe's")


class LoraA2(FedAvg):
    """Alternating factors, adaptive slices."""

    Knobs = LoraA2Knobs
    leaves = ("update", "places")
    paces = ("synchronous",)
    feedback = "other slices are sent in every round, to which the last round's losses do not belong"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        require_lora(recipe)

    def begin(self, world: World) -> State:
        """Both factors at the largest rank; B moves first."""
        return State(shared=world.starting_state(), facts={"turn": 0, "seen": [-1] * len(world.nodes)})

    def brief(self, state: State, node: int) -> Parcel:
        """Describe both factors, and whose turn it is."""
        return Parcel("work", {"turn": state.facts["turn"]}, with_role("shared", state.shared))

    def abridge(self, brief: Parcel, state: State, node: int) -> Parcel:
        """Leave out the factor that stood still, for a node that was there in the round before."""
        turn = state.facts["turn"]
        if turn == 0 or state.facts["seen"][node] != turn - 1:
            return brief
        return Parcel(brief.kind, brief.header, moving(brief.tensors, turn - 1))

    def adopt(self, brief: Parcel, party: Party) -> Trainable:
        """Load both factors at the largest rank, from the brief and from the round before."""
        state = {**group(party.personal, "held"), **group(brief.tensors, "shared")}
        trainable = party.trainable(rank_of(self.recipe, -1))
        trainable.load(state)
        party.personal |= with_role("held", state)
        return trainable

    def expects(self, brief: Parcel) -> None:
        """Which slices come is the party's choice; ``inspect`` checks them."""

    def inspect(self, state: State, node: int, answer: Parcel) -> None:
        """Refuse slices that do not exist, come twice, exceed the budget, or do not fit their values."""
        places, values = group(answer.tensors, "places"), group(answer.tensors, "update")
        if places.keys() != {"slices"} or values.keys() != {"values"}:
            raise ParcelError(f"the answer holds {sorted(answer.tensors)}: 'places/slices' and 'update/values' are due")
        numbers, shared = places["slices"], moving(state.shared, state.facts["turn"])
        count = len(shared) * rank_of_state(shared)
        if numbers.is_floating_point() or numbers.dim() != 1 or len(numbers) > self.budget(node) * len(shared):
            raise ParcelError(f"'places/slices' is {numbers.dtype} of {tuple(numbers.shape)}: a list within the budget")
        listed = numbers.long()
        if len(listed) and (listed.min() < 0 or listed.max() >= count or bool((listed.diff() <= 0).any())):
            raise ParcelError(f"'places/slices' names a slice twice, or one beyond the {count} there are")
        wanted = sum(len(row) for row in _rows(shared, listed))
        if tuple(values["values"].shape) != (wanted,):
            raise ParcelError(f"'update/values' is of {tuple(values['values'].shape)}; its slices hold {wanted} values")

    def work(self, brief: Parcel, party: Party) -> Parcel:
        """Probe, choose, train what was chosen, send its change."""
        trainable, turn = self.adopt(brief, party), int(brief.header["turn"])
        start = trainable.state()
        names = moving(start, turn).keys()
        if turn % 2 == 0:
            rate = party.recipe.training.learning_rate * self.knobs.ratio
            party = replace(party, recipe=party.recipe.replace({"training.learning_rate": rate}))
        party.train(trainable, self.knobs.probe_steps, only=names)
        numbers = choose(start, moving(subtract(trainable.state(), start), turn), self.budget(party.node))
        trainable.load(start)
        trainable.mask(masks(moving(start, turn), numbers))
        try:
            result = party.train(trainable, only=names)
        finally:
            trainable.mask(None)
        change = moving(subtract(trainable.state(), start), turn)
        places = {"slices": numbers.to(index_type(len(change) * rank_of_state(change)))}
        return party.answer(result.loss, {"values": torch.cat(_rows(change, numbers))}, places=places)

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        """Average the changes of the factor that moved, zero where nothing was sent."""
        ordered = sorted(answers, key=lambda answer: answer.node)
        shared = moving(state.shared, state.facts["turn"])
        updates = [
            scatter(shared, answer.tensors("places")["slices"], answer.tensors()["values"]) for answer in ordered
        ]
        mean = weighted_mean(updates, [answer.weight for answer in ordered])
        return Outcome(shared=mean, facts={"answered": [answer.node for answer in ordered]})

    def step(self, state: State, outcome: Outcome) -> State:
        """Move the factor, and give the other one its turn."""
        turn, seen = state.facts["turn"], list(state.facts["seen"])
        for node in outcome.facts["answered"]:
            seen[node] = turn
        return state.but(shared=add(state.shared, outcome.shared), facts={"turn": turn + 1, "seen": seen})

    def budget(self, node: int) -> int:
        """Return how many slices per layer a node may train."""
        ranks = self.recipe.trainable.rank
        return min(self.knobs.budget, ranks) if isinstance(ranks, int) else ranks[node % len(ranks)]


def moving(tensors: Tensors, turn: int) -> Tensors:
    """Return the factor whose turn it is: B in even turns, A in odd ones."""
    return factors_a(tensors) if turn % 2 else factors_b(tensors)


def rank_of_state(factor: Tensors) -> int:
    """Return the rank of a state that holds only A or only B."""
    name, tensor = next(iter(factor.items()))
    return tensor.shape[0 if is_a(name) else 1]


def choose(start: Tensors, change: Tensors, budget: int) -> Tensor:
    """Return the numbers, rising, of the ``budget`` times layers slices whose change matters most.

    Slice i of the n-th layer by name, of rank r, has the number ``n r + i``. Ties go to the lower number.
    """
    scores = []
    for path in layers(start):
        down, up = f"{path}.lora_A", f"{path}.lora_B"
        scores.append(change.get(up, start[up]).norm(dim=0) * change.get(down, start[down]).norm(dim=1))
    order = torch.cat(scores).argsort(descending=True, stable=True)
    return order[: budget * len(scores)].sort().values


def masks(factor: Tensors, numbers: Tensor) -> Tensors:
    """Return masks that leave only the numbered slices free."""
    ones = [torch.ones_like(row) for row in _rows(factor, numbers)]
    return scatter(factor, numbers, torch.cat(ones))


def scatter(factor: Tensors, numbers: Tensor, values: Tensor) -> Tensors:
    """Return tensors shaped like ``factor``, with ``values`` in the numbered slices and zero elsewhere."""
    full = {name: torch.zeros_like(tensor) for name, tensor in factor.items()}
    rows = _rows(full, numbers)
    for row, piece in zip(rows, torch.split(values, [len(row) for row in rows]), strict=True):
        row.copy_(piece)
    return full


def _rows(factor: Mapping[str, Tensor], numbers: Tensor) -> list[Tensor]:
    """Return views of the numbered slices: rows of A, columns of B."""
    names, rank = sorted(factor), rank_of_state(dict(factor))
    chosen = [(names[number // rank], number % rank) for number in numbers.tolist()]
    return [factor[name][slot] if is_a(name) else factor[name][:, slot] for name, slot in chosen]


def claim(lab: Laboratory) -> Measured:
    """At the upload of plain LoRA's rank 1: no aggregation error, and a lower loss than plain LoRA and FFA-LoRA."""
    common = {"rounds.count": 8, "rounds.evaluate_every": 100}
    ours: dict[str, Any] = {**common, "trainable.rank": 8, "knobs": {"budget": 2}}
    # One factor of two slices weighs what both factors of one do.
    arms = {
        "lora_a2": ("lora_a2", ours),
        "even": ("lora_a2", {**ours, "knobs": {"budget": 2, "ratio": 1.0}}),
        "plain": ("fedavg", {**common, "trainable.rank": 1}),
        "ffa": ("ffa_lora", {**common, "trainable.rank": 2}),
    }
    errors = {arm: max(aggregation_errors(lab.world(lab.recipe(*arms[arm])), 2)) for arm in ("lora_a2", "plain")}
    finished = {arm: lab.run(lab.recipe(name, changes)) for arm, (name, changes) in arms.items()}
    loss = {arm: run.loss() for arm, run in finished.items()}
    up = {arm: run.meter.total("up", purpose="work") for arm, run in finished.items()}
    weights = 4 * sum(parameter.numel() for parameter in finished["plain"].world.base.model.parameters())
    share = up["lora_a2"] / finished["lora_a2"].meter.frames("up", purpose="work") / weights
    return Measured(
        f"aggregation error {errors['lora_a2']:.1e} against {errors['plain']:.2f} for plain averaging; with two "
        f"slices a layer the loss is {loss['lora_a2']:.3f} (with equal rates {loss['even']:.3f}) at "
        f"{up['lora_a2'] / up['plain']:.2f} times the upload of plain LoRA's rank 1, which reaches "
        f"{loss['plain']:.3f}; FFA-LoRA of rank 2 {loss['ffa']:.3f}; an upload is {share:.2%} of all weights",
        errors["lora_a2"] < 1e-5 < errors["plain"] and loss["lora_a2"] < min(loss["plain"], loss["ffa"]),
        {"error": errors["lora_a2"], "plain_error": errors["plain"], "upload_share": share, **loss},
    )
