"""Alpa: operators are divided within stages and stages over devices, each by an exact solver, one inside the other.

Zheng et al. 2022, "Alpa: Automating Inter- and Intra-Operator Parallelism for Distributed Deep Learning" (catalogue
number 58, with Ray). For layers i..j as a stage on n devices the integer programme of ``decisions.two_level`` chooses
rows or columns for every operator; the dynamic programme over (stages, layers, devices), under every bound t_max on
the slowest stage, then makes   sum_s t_s + (B - 1) max_s t_s   least, with one micro-batch in flight for a stage and
each one behind it. Meshes are of 1, 2, 4, ... devices, which always fill the cluster.

Here operators are those of a decoder's blocks; costs are those of ``decisions.cost``. Ray's part, which keeps workers
alive and moves tensors between meshes, is what every engine here does anyway.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from mycel.decisions.graph import Graph, graph_of
from mycel.decisions.two_level import (
    Operators,
    Option,
    Sharding,
    Slices,
    Slicing,
    Way,
    every_sharding,
    every_slicing,
)
from mycel.errors import RecipeError
from mycel.rounds.laboratory import Laboratory, Measured

NUMBER = 4


@dataclass(frozen=True)
class Cluster:
    """Equal devices: operations and link bytes a second, memory in bytes, and the tokens of a micro-batch."""

    devices: int
    speed: float
    link: float
    room: float
    tokens: int
    micro_batches: int


def operators_of(graph: Graph, cluster: Cluster, blocks: int, devices: int, room: float) -> Operators:
    """Attention and feed-forward part of each block, with every way to share rows and columns out over the devices."""
    block = graph.blocks[0]
    attention = 4 * graph.hidden**2
    parts = [(weights, block.flops * weights / block.weights) for weights in (attention, block.weights - attention)]
    shapes = [(devices // tensor, tensor) for tensor in (1, 2, 4, 8) if devices % tensor == 0]
    state = cluster.tokens * graph.hidden * NUMBER
    ways = tuple(
        tuple(_way(cluster, weights, flops, state, *shape) for shape in shapes) for weights, flops in parts * blocks
    )
    # Rows that lie elsewhere than the next operator wants them are gathered, and their gradients scattered.
    moving = tuple(
        tuple(2 * state / cluster.link * (1 / min(a, c) - 1 / max(a, c)) if a != c else 0.0 for c, _ in shapes)
        for a, _ in shapes
    )
    return Operators(ways, {(index, index + 1): moving for index in range(len(ways) - 1)}, room)


def _way(cluster: Cluster, weights: float, flops: float, state: float, data: int, tensor: int) -> Way:
    seconds = 3 * flops * cluster.tokens / (data * tensor * cluster.speed)
    seconds += 4 * state / data * (tensor - 1) / tensor / cluster.link  # one sum forward, one back
    # Gradients are averaged once a step.
    seconds += 2 * weights / tensor * NUMBER * (data - 1) / data / cluster.link / cluster.micro_batches
    return Way(f"{data} x {tensor}", seconds, 4 * weights / tensor * NUMBER)


def slices_of(graph: Graph, cluster: Cluster) -> Slices:
    """Every stage of blocks on every mesh, its operators divided by the integer programme."""
    made: dict[tuple[int, int], tuple[Option, ...]] = {}
    layers, sharding = len(graph.blocks), Sharding()
    for count in range(1, layers + 1):  # blocks are alike, so a stage's cost depends on their number alone
        options = []
        for devices in (1, 2, 4, 8):
            if devices > cluster.devices:
                break
            for room in (cluster.room, cluster.room / 2):
                seen = operators_of(graph, cluster, count, devices, room)
                try:
                    ways = sharding.decide(seen)
                except RecipeError:
                    continue
                fixed = sum(each[way].bytes for each, way in zip(seen.ways, ways, strict=True))
                kept = count * graph.blocks[0].kept * cluster.tokens * NUMBER / devices
                options.append(Option(devices, sharding.cost(seen, ways), fixed, kept))
        for first in range(layers - count + 1):
            made[first, first + count] = tuple(dict.fromkeys(options))
    return Slices(layers, cluster.devices, cluster.micro_batches, cluster.room, made)


def random_operators(chance: random.Random) -> Operators:
    """At most six operators with at most three ways each, a chain with residual edges over it."""
    count = chance.randint(1, 6)
    ways = tuple(
        tuple(Way(str(way), chance.uniform(0, 3), chance.uniform(0, 2)) for way in range(chance.randint(1, 3)))
        for _ in range(count)
    )
    edges = {
        (a, b): tuple(tuple(chance.uniform(0, 2) for _ in ways[b]) for _ in ways[a])
        for a in range(count)
        for b in range(a + 1, count)
        if b == a + 1 or chance.random() < 0.3
    }
    least = sum(min(way.bytes for way in each) for each in ways)
    return Operators(ways, edges, least * chance.uniform(1.0, 2.0) + 1e-6)


def random_slices(chance: random.Random) -> Slices:
    """At most eight layers on at most four devices, with random costs and memory that often binds."""
    layers, devices = chance.randint(1, 8), chance.choice([1, 2, 4])
    options = {
        (first, last): tuple(
            Option(
                number,
                *((last - first) * chance.uniform(*span) / number for span in ((0.5, 1.5), (0.5, 1), (0.1, 0.3))),
            )
            for number in (1, 2, 4)
            if number <= devices and chance.random() < 0.9
        )
        for first in range(layers)
        for last in range(first + 1, layers + 1)
    }
    return Slices(layers, devices, chance.randint(1, 6), chance.uniform(1.5, 12), options)


def least_sharding(seen: Operators) -> float:
    """Least cost of all ways, by trying each."""
    plan = Sharding()
    return min(plan.cost(seen, ways) for ways in every_sharding(seen) if not plan.fault(seen, ways))


def least_slicing(seen: Slices) -> float:
    """Least cost of all divisions, by trying each; infinite where none fits."""
    plan = Slicing()
    sound = (stages for stages in every_slicing(seen) if not plan.fault(seen, stages))
    return min((plan.cost(seen, stages) for stages in sound), default=float("inf"))


def claim(lab: Laboratory) -> Measured:
    """Equal to trying everything on small cases; better than a single way; its stages compute the whole model."""
    from mycel.models.sizes import SIZES

    chance, worst, cases = random.Random(0), 0.0, 0
    for _ in range(200):
        inner = random_operators(chance)
        worst = max(worst, Sharding().cost(inner, Sharding().decide(inner)) / least_sharding(inner) - 1)
        outer = random_slices(chance)
        if (least := least_slicing(outer)) < float("inf"):
            worst = max(worst, Slicing().cost(outer, Slicing().decide(outer)) / least - 1)
            cases += 1
    graph = graph_of(SIZES["tiny"].config(), 128)
    cluster = Cluster(4, 2e10, 1.2e8, 18e6, 256, 8)
    seen = slices_of(graph, cluster)
    stages = Slicing().decide(seen)
    cost = Slicing().cost(seen, stages)
    alone = _single_ways(seen)
    apart = _apart([stage.last - stage.first for stage in stages])
    shape = ", ".join(f"{s.last - s.first} blocks on {s.option.devices}" for s in stages)
    return Measured(
        f"at most {worst:.0e} above trying everything, over 200 cases within a stage and {cases} across; the base tiny "
        f"on 4 thin-linked devices: {shape}, {cost * 1e3:.0f} ms a step, one stage over all {alone[0] * 1e3:.0f}, a "
        f"stage each {alone[1] * 1e3:.0f}; its stages' loss and gradients lie {apart:.1e} from the uncut model's",
        worst < 1e-6 and cost <= min(alone) * (1 + 1e-9) and apart < 1e-5,
        {"worst": worst, "seconds": cost, "single_stage": alone[0], "all_stages": alone[1], "apart": apart},
    )


def _single_ways(seen: Slices) -> tuple[float, float]:
    """Step seconds with operators divided over all devices in one stage, and with one stage a device."""
    plan, found = Slicing(), []
    for only in (seen.devices, 1):
        options = {
            key: tuple(option for option in options if option.devices == only) for key, options in seen.options.items()
        }
        part = Slices(seen.layers, seen.devices, seen.micro_batches, seen.room, options)
        try:
            found.append(plan.cost(part, plan.decide(part)))
        except RecipeError:
            found.append(float("inf"))
    return found[0], found[1]


def _apart(split: list[int]) -> float:
    import torch
    from transformers import LlamaForCausalLM

    from mycel.models.sizes import SIZES
    from mycel.segments.stages import Stages

    rows = torch.randint(3, 2048, (4, 32), generator=torch.Generator().manual_seed(1))
    found = []
    for each, pieces in (([sum(split)], 1), (split, 4)):
        torch.manual_seed(2)
        model = LlamaForCausalLM(SIZES["tiny"].config())
        loss = Stages(model, each).gradients(rows, pieces)
        gradient = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
        found.append((loss, gradient))
    (loss, gradient), (other, theirs) = found
    return max(abs(other / loss - 1), float((theirs - gradient).norm() / gradient.norm()))
