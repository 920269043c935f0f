"""What hidden sums ought to come to: the same rounds in the open, with whole numbers added up in one process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import torch

from mycel.engines.leaving import Leaving
from mycel.recipe.schema import Recipe
from mycel.rounds.registry import load_system
from mycel.rounds.simulation import Finished, Simulation
from mycel.rounds.system import Answer, State
from mycel.rounds.world import World
from mycel.wire.algebra import group, scale, with_role
from mycel.wire.codecs import parse_codec
from mycel.wire.codecs.fixed import Fixed
from mycel.wire.parcel import Parcel, Tensors

if TYPE_CHECKING:
    from mycel.rounds.coordinator import Coordinator
    from mycel.rounds.laboratory import Laboratory

Leaves = Callable[[int, str, int], bool]


def beside_plain_sums(lab: Laboratory, recipe: Recipe, leaves: Leaves) -> tuple[Finished, list[set[int]], bool]:
    """Run ``recipe`` while nodes leave; return it, whose inputs arrived in each round, and whether both states agree.

    Parameters
    ----------
    leaves : callable
        Whether a node falls silent at a message: ``(node, kind, version)``.
    """
    answered: list[set[int]] = []

    def watch(coordinator: Coordinator) -> None:
        if coordinator.latest:
            answered.append({answer.node for answer in coordinator.latest})

    world = lab.world(recipe)
    finished = Simulation(lab.arm(), world, Leaving(lab.place.labour, leaves), checkpoint=watch).run()
    return finished, answered, finished.state.sha256() == plain_sums(world, answered).sha256()


def plain_sums(world: World, answered: Sequence[Collection[int]]) -> State:
    """Run a system's rounds with plain fixed-point sums over the nodes that answered in each; return the state.

    Every party's update becomes levels of the recipe's codec, times its examples; levels are added as integers, and
    the system is given their mean.
    """
    system = load_system(world.recipe)
    state = system.begin(world)
    codec = parse_codec(world.recipe.wire.codec)
    assert isinstance(codec, Fixed)
    for version, nodes in enumerate(answered):
        total: Tensors = {}
        for node in nodes:
            brief = system.abridge(system.brief(state, node), state, node)
            dated = Parcel(brief.kind, {**brief.header, "version": version}, brief.tensors)
            party = world.site.party(node, version)
            update = group(system.work(dated, party).tensors, "update")
            for name, tensor in update.items():
                levels = codec.levels(tensor) * party.samples
                total[name] = total[name] + levels if name in total else levels
        weight = sum(world.nodes[node].samples for node in nodes)
        mean = scale({name: codec.value(value.to(torch.int64)) for name, value in total.items()}, 1 / weight)
        answer = Parcel("answer", {"samples": weight}, with_role("update", mean))
        state = system.step(state, system.combine(state, [Answer(-1, answer, weight, 0, float(weight))]))
    return state
