"""The rounds of a system played by hand, with frames between the two ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mycel.finetune.fedkseed import PLAIN
from mycel.recipe.schema import Recipe
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.registry import load_system
from mycel.rounds.system import Answer, State, System
from mycel.rounds.world import World
from mycel.wire.parcel import Parcel, Tensors

SMALL: dict[str, Any] = {
    "data.parties": "iid",
    "data.count": 2,
    "data.examples": 16,
    "data.held_out": 4,
    "data.max_length": 32,
    "rounds.count": 2,
    "rounds.local_steps": 3,
    "training.batch_size": 2,
    "trainable.rank": 4,
}
FORWARD = {key: value for key, value in PLAIN.items() if key != "trainable.kind"}
FULL = {"trainable.kind": "full"}


class Play:
    """The rounds of a system, played by hand, with frames between the two ends."""

    def __init__(self, lab: Laboratory, recipe: Recipe) -> None:
        self.world: World = lab.world(recipe)
        self.system: System = load_system(recipe)
        self.state: State = self.system.begin(self.world)
        self.homes: dict[int, Tensors] = {}
        self.version = 0

    def brief(self, node: int) -> Parcel:
        """What the node receives."""
        told = self.system.abridge(self.system.brief(self.state, node), self.state, node)
        return Parcel.from_bytes(Parcel(told.kind, {**told.header, "version": self.version}, told.tensors).to_bytes())

    def work(self, node: int) -> Parcel:
        """What the node answers."""
        party = self.world.site.party(node, self.version, self.homes.get(node))
        answer = self.system.work(self.brief(node), party)
        self.homes[node] = dict(Parcel.from_bytes(Parcel("home", {}, party.personal).to_bytes()).tensors)
        return Parcel.from_bytes(answer.to_bytes())

    def round(self, nodes: Sequence[int]) -> None:
        """Ask the nodes, and move."""
        answers = [Answer(node, self.work(node), 10 + node, 0, 10.0 + node) for node in nodes]
        self.state = self.system.step(self.state, self.system.combine(self.state, answers))
        self.version += 1


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())
