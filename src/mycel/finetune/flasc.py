"""FLASC: LoRA stays dense at the parties, only the messages are sparse, down and up each at a density of its own.

Kuo et al. 2024, "Federated LoRA with Sparse Communication" (catalogue number 89).

    brief to k:   w_k = Top_down(w)            what is left out is zero at the party, which remembers nothing
    party k:      all of w_k is trained;       d_k = Top_up(trained - w_k)
    coordinator:  g = -mean_k d_k (parties count alike);  w <- Adam(w, g), dense

Top_d keeps the fraction d of largest magnitude over all factors together, chosen afresh for every message, without
error feedback. A message is values and the gaps between their places, both real bytes on the wire. A party's model, in
training, scoring and delivery, is what it is sent.

Densities may be lists, one per party, for links of unlike speed. With both densities 1 this is dense federated LoRA
with the same server optimiser; with ``server = "sgd"`` and rate 1 as well it is federated averaging with equal weights.

A sparse download needs patience: A starts at random and B at zero, so B's entries are not among the largest before
they have outgrown A's, and until then parties are sent an adapter that changes nothing. The paper's 200 rounds leave
time for that, a short run does not; so ``download`` is 1 unless set.

The paper trains with SGD at home and clips and noises the sparse change for privacy; the first is the recipe's
``training.optimizer``, the second is no part of this file. The server's rate in the paper is 1e-3 to 5e-3. Neither
the epsilon of its Adam (here 1e-8) nor whether the paper scores the dense or the sparse model could be verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mycel.finetune.fedavg import FedAvg
from mycel.recipe.schema import Recipe
from mycel.rounds.checking import check_shapes
from mycel.rounds.factors import require_lora
from mycel.rounds.laboratory import Measured
from mycel.rounds.system import Answer, Knobs, Outcome, State
from mycel.wire.algebra import add, group, resize_rank, scale, subtract, weighted_mean, with_role
from mycel.wire.codecs.topk import TopK
from mycel.wire.parcel import Parcel, Tensors

if TYPE_CHECKING:
    from mycel.models.trainable import Trainable
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.party import Party
    from mycel.rounds.world import World

Density = Annotated[float, Field(gt=0, le=1)]


class FlascKnobs(Knobs):
    """Settings of FLASC."""

    download: Density | list[Density] = Field(1.0, description="share of entries sent to a party, or one per party")
    upload: Density | list[Density] = Field(0.25, description="share of entries a party sends, or one per party")
    server: Literal["adam", "sgd"] = Field("adam", description="optimiser that the mean change is the gradient of")
    server_rate: float = Field(5e-3, gt=0, description="the server's learning rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of Adam's mean")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of Adam's square")


class Flasc(FedAvg):
    """Sparse messages around dense training."""

    Knobs = FlascKnobs
    feedback = "other entries are sent in every round, to which the last round's losses do not belong"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        require_lora(recipe)

    def begin(self, world: World) -> State:
        """Start from the dense state, at round 0."""
        return State(shared=world.starting_state(), facts={"rounds": 0})

    def brief(self, state: State, node: int) -> Parcel:
        """Describe the largest entries among zeros."""
        shared, density = self.cut(state.shared, node), self.density(self.knobs.download, node)
        flat = flatten(shared)
        kept = unflatten(unpack(pack(flat, density), density, len(flat)), shared)
        return Parcel("work", {}, with_role("shared", kept))

    def abridge(self, brief: Parcel, state: State, node: int) -> Parcel:
        """Send only the largest entries and their places."""
        density = self.density(self.knobs.download, node)
        if density == 1:
            return brief
        parts = pack(flatten(group(brief.tensors, "shared")), density)
        return Parcel(brief.kind, {**brief.header, "density": density}, with_role("kept", parts))

    def adopt(self, brief: Parcel, party: Party) -> Trainable:
        """Load what was sent, zero elsewhere."""
        trainable = party.trainable()
        shared = group(brief.tensors, "shared")
        if not shared:
            flat = unpack(group(brief.tensors, "kept"), float(brief.header["density"]), trainable.size())
            shared = unflatten(flat, trainable.state())
        trainable.load(shared)
        return trainable

    def expects(self, brief: Parcel) -> None:
        """Sizes follow from the state, where ``inspect`` checks them."""

    def inspect(self, state: State, node: int, answer: Parcel) -> None:
        """Refuse places outside the state, places named twice, and values too many or too few."""
        self._dense(state, node, group(answer.tensors, "update"))

    def work(self, brief: Parcel, party: Party) -> Parcel:
        """Train every entry and send the largest changes."""
        trainable = self.adopt(brief, party)
        before = trainable.state()
        result = party.train(trainable)
        change = flatten(subtract(trainable.state(), before))
        return party.answer(result.loss, pack(change, self.density(self.knobs.upload, party.node)))

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        """Average what was sent, zero elsewhere; only staleness makes parties count unlike."""
        ordered = sorted(answers, key=lambda answer: answer.node)
        updates = (self._dense(state, answer.node, answer.tensors()) for answer in ordered)
        return Outcome(shared=weighted_mean(updates, [answer.weight / max(answer.samples, 1) for answer in ordered]))

    def step(self, state: State, outcome: Outcome) -> State:
        """Let the server's optimiser move the dense state."""
        knobs, rounds = self.knobs, state.facts["rounds"] + 1
        facts = {**state.facts, "rounds": rounds}
        if knobs.server == "sgd":
            return state.but(shared=add(state.shared, outcome.shared, knobs.server_rate), facts=facts)
        mean, square = group(state.server, "mean"), group(state.server, "square")
        zero = scale(outcome.shared, 0.0)
        mean = add(scale(mean or zero, knobs.beta1), outcome.shared, 1 - knobs.beta1)
        squared = {name: value.square() for name, value in outcome.shared.items()}
        square = add(scale(square or zero, knobs.beta2), squared, 1 - knobs.beta2)
        fix1, fix2 = 1 - knobs.beta1**rounds, 1 - knobs.beta2**rounds
        move = {name: (mean[name] / fix1) / ((square[name] / fix2).sqrt() + 1e-8) for name in mean}
        server = {**with_role("mean", mean), **with_role("square", square)}
        return state.but(shared=add(state.shared, move, knobs.server_rate), server=server, facts=facts)

    @staticmethod
    def density(knob: float | list[float], node: int) -> float:
        """Return the density that a knob gives to a node; the coordinator looks at the highest."""
        if not isinstance(knob, list):
            return knob
        return knob[node % len(knob)] if node >= 0 else max(knob)

    def _dense(self, state: State, node: int, parts: Tensors) -> Tensors:
        like = self.cut(state.shared, node)
        count = sum(value.numel() for value in like.values())
        change = unflatten(unpack(parts, self.density(self.knobs.upload, node), count), like)
        ranks = {tensor.shape[0] for name, tensor in state.shared.items() if name.endswith("lora_A")}
        return resize_rank(change, max(ranks))


def pack(flat: Tensor, density: float) -> Tensors:
    """Return the largest values and the gaps between their places; everything needs no places."""
    return TopK(density).encode(flat) if density < 1 else {"values": flat}


def unpack(parts: Tensors, density: float, count: int) -> Tensor:
    """Inverse of ``pack`` for ``count`` entries, zero where nothing was sent; parts that do not fit are refused."""
    if density < 1:
        return TopK(density).decode(parts, (count,))
    check_shapes(parts, {"values": (count,)})
    return parts["values"]


def flatten(state: Tensors) -> Tensor:
    """Lay all tensors end to end, in the order of their names."""
    return torch.cat([state[name].reshape(-1) for name in sorted(state)])


def unflatten(flat: Tensor, like: Tensors) -> Tensors:
    """Inverse of ``flatten`` for the shapes of ``like``."""
    names = sorted(like)
    pieces = torch.split(flat, [like[name].numel() for name in names])
    return {name: piece.reshape(like[name].shape) for name, piece in zip(names, pieces, strict=True)}


def claim(lab: Laboratory) -> Measured:
    """A sixteenth of the entries up: loss near the dense one's and below that of a sixteenth of the rank."""
    common = {"rounds.count": 6, "rounds.evaluate_every": 100, "trainable.rank": 16}
    dense = {"upload": 1.0, "server_rate": 0.01}
    arms = {
        "dense": {**common, "knobs": dense},
        "sparse": {**common, "knobs": {**dense, "upload": 1 / 16}},
        "rank_1": {**common, "knobs": dense, "trainable.rank": 1},
        "both_ways": {**common, "knobs": {**dense, "upload": 1 / 4, "download": 1 / 4}},
    }
    finished = {name: lab.run(lab.recipe("flasc", changes)) for name, changes in arms.items()}
    loss = {name: arm.loss() for name, arm in finished.items()}
    before = finished["dense"].loss(0)
    up = {name: arm.meter.total("up", purpose="work") for name, arm in finished.items()}
    excess, saved = loss["sparse"] / loss["dense"] - 1, up["dense"] / up["sparse"]
    return Measured(
        f"with {saved:.1f} times less upload (values and places) the loss is {loss['sparse']:.3f}, {excess:+.1%} of "
        f"dense ({loss['dense']:.3f}; untuned {before:.3f}), at rank 1 {loss['rank_1']:.3f}; with a quarter both ways "
        f"{loss['both_ways']:.3f}",
        excess < 0.03 and loss["sparse"] < loss["rank_1"] and loss["sparse"] < before,
        {"excess": excess, "saved": saved, "before": before, **loss},
    )
