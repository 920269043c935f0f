"""Who does what inside an island: devices, layout and split, with second and third best and why the others stay out.

Small fleets are searched whole: every subset of the devices in every useful order, every layout that divides, the split
by the exact partition. Larger ones are searched from the fastest device down, slower ones joining while they help.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise, permutations
from typing import Any

from mycel.decisions.contract import Decision
from mycel.decisions.cost import GIB, NOMINAL, Coefficients, Predicted, Work, memory_of, predict, stage_seconds
from mycel.decisions.layout import layouts
from mycel.decisions.partition import Chain, Partition, StageCost
from mycel.errors import RecipeError
from mycel.fleet.device import Device
from mycel.recipe.schema import Layout

SMALL = 5  # devices up to which every subset and order is tried
UNITS = {"seconds": "s", "joules": "J", "money": "of money"}


@dataclass(frozen=True)
class Task:
    """What is to be laid out, and over whom.

    Attributes
    ----------
    config : transformers configuration
        Of the model.
    micro_batches : tuple of int
        Numbers of micro-batches to try where there is a pipeline.
    objective : str
        What is made least: seconds, joules or money of a step.
    """

    work: Work
    config: Any
    devices: tuple[Device, ...]
    coefficients: Coefficients = NOMINAL
    micro_batches: tuple[int, ...] = (1, 2, 4, 8)
    objective: str = "seconds"


@dataclass(frozen=True)
class Placement:
    """One plan: the layout with its split, and the device of every rank."""

    layout: Layout
    split: tuple[int, ...]
    devices: tuple[Device, ...]
    predicted: Predicted

    def value(self, objective: str) -> float:
        """Return what is made least."""
        return float(getattr(self.predicted, objective))


class Plans(Decision[Task, Placement]):
    """The best placement; ``ranked`` returns several."""

    def decide(self, observation: Task) -> Placement:
        """Return the placement that costs least; ``RecipeError`` says what is missing when none fits."""
        return self.ranked(observation)[0]

    def ranked(self, task: Task, count: int = 3) -> list[Placement]:
        """Return the best placements, the least cost first, no two of them the same layout and devices."""
        found: dict[tuple[str, frozenset[str]], Placement] = {}
        for devices in orders(task.devices):
            for placement in placements(task, devices):
                key = placement.layout.model_dump_json(exclude={"blocks"}), frozenset(_names(devices))
                if key not in found or placement.value(task.objective) < found[key].value(task.objective):
                    found[key] = placement
        if not found:
            raise RecipeError(refusal(task))
        return sorted(found.values(), key=lambda each: (each.value(task.objective), len(each.devices)))[:count]

    def fault(self, observation: Task, action: Placement) -> str:
        """Every rank's part must fit its device."""
        inside = len(action.devices) // action.layout.pipeline
        for index, device in enumerate(action.devices):
            needed = memory_of(observation.work, action.layout, action.split, index // inside, observation.coefficients)
            if needed > device.memory_gib * GIB:
                return f"needs {needed / GIB:.3g} GiB on {device.name}, which has {device.memory_gib:g}"
        return ""

    def cost(self, observation: Task, action: Placement) -> float:
        """Seconds, joules or money of a step."""
        return action.value(observation.objective)


def orders(devices: tuple[Device, ...]) -> Iterator[tuple[Device, ...]]:
    """Subsets of the devices in the orders worth trying along a pipeline."""
    if len(devices) <= SMALL:
        for count in range(1, len(devices) + 1):
            for chosen in combinations(devices, count):
                yield from dict.fromkeys(permutations(chosen))
        return
    fast = sorted(devices, key=lambda device: -device.gflops)
    for count in range(1, len(fast) + 1):
        yield tuple(fast[:count])
        yield tuple(reversed(fast[:count]))


def placements(task: Task, devices: tuple[Device, ...]) -> Iterator[Placement]:
    """Every placement over exactly these devices in this order that fits their memory."""
    graph, plans = task.work.graph, Plans()
    for pieces in task.micro_batches:
        for plain in layouts(len(devices), task.config, task.work.batch_size, graph.length, pieces):
            if plain.pipeline == 1 and pieces != task.micro_batches[0]:
                continue
            for layout in (plain, plain.model_copy(update={"recompute": True})):
                split = _split(task, layout, devices)
                if split is None or not joined(layout, devices):
                    continue
                chosen = layout.model_copy(update={"blocks": list(split) if layout.pipeline > 1 else []})
                predicted = predict(task.work, chosen, split, devices, task.coefficients)
                placement = Placement(chosen, split, devices, predicted)
                if not plans.fault(task, placement):
                    yield placement
                    break  # recomputation only where memory asks for it


def joined(layout: Layout, devices: tuple[Device, ...]) -> bool:
    """Whether links join all ranks of each stage, and each rank of a stage with its like in the next."""
    inside = len(devices) // layout.pipeline
    stages = [devices[place * inside : (place + 1) * inside] for place in range(layout.pipeline)]
    within = all(a.reaches(b) for stage in stages for a, b in combinations(stage, 2))
    return within and all(
        a.reaches(b) for before, after in pairwise(stages) for a, b in zip(before, after, strict=True)
    )


def _split(task: Task, layout: Layout, devices: tuple[Device, ...]) -> tuple[int, ...] | None:
    blocks = len(task.work.graph.blocks)
    if layout.pipeline == 1:
        return (blocks,)
    inside, stages = len(devices) // layout.pipeline, []
    for place in range(layout.pipeline):
        held = devices[place * inside : (place + 1) * inside]

        def seconds(count: int, place: int = place, held: tuple[Device, ...] = held) -> float:
            split = [count if index == place else 1 for index in range(layout.pipeline)]
            return stage_seconds(task.work, layout, split, place, held, task.coefficients)

        each = seconds(2) - seconds(1)
        stages.append(StageCost(each, seconds(1) - each, _room(task, layout, place, held, blocks)))
    try:
        return Partition().decide(Chain(blocks, tuple(stages), layout.micro_batches))
    except RecipeError:
        return None


def _room(task: Task, layout: Layout, place: int, held: tuple[Device, ...], blocks: int) -> int:
    least = min(device.memory_gib for device in held) * GIB
    room = 0
    for count in range(1, blocks + 1):
        split = [count if index == place else 1 for index in range(layout.pipeline)]
        if memory_of(task.work, layout, split, place, task.coefficients) > least:
            break
        room = count
    return room


def left_out(task: Task, chosen: Placement) -> dict[str, str]:
    """Say of each device that stays out why: it does not fit, or the step would take longer with it."""
    reasons = {}
    inside = set(_names(chosen.devices))
    for device in task.devices:
        if device.name in inside:
            continue
        found = [
            placement
            for devices in orders((*chosen.devices, device))
            if device.name in _names(devices)
            for placement in placements(task, devices)
        ]
        apart = [other.name for other in chosen.devices if not device.reaches(other)]
        no_link = f"it has no link to {', '.join(apart)}" if apart else ""
        if not found:
            reasons[device.name] = no_link or f"nothing fits its {device.memory_gib:g} GiB"
            continue
        best = min(found, key=lambda each: each.value(task.objective)).value(task.objective)
        reasons[device.name] = (
            f"the best plan that uses it takes {best:.3g} {UNITS[task.objective]} a step, "
            f"this one {chosen.value(task.objective):.3g}{'; ' + no_link if apart else ''}"
        )
    return reasons


def refusal(task: Task) -> str:
    """Say what the best attempt lacks, where, and what would do."""
    graph, blocks = task.work.graph, len(task.work.graph.blocks)
    device = max(task.devices, key=lambda each: each.memory_gib)
    single = memory_of(task.work, Layout(), (blocks,), 0, task.coefficients) / GIB
    again = memory_of(task.work, Layout(recompute=True), (blocks,), 0, task.coefficients) / GIB
    ways = []
    length = graph.length
    while length > 16 and single > device.memory_gib:
        length //= 2
        if single * length / graph.length <= device.memory_gib:
            ways.append(f"sequence {length}")
            break
    ways.append("recomputation" if again <= device.memory_gib else "more devices or a smaller model")
    missing = [f"{a.name} and {b.name}" for a, b in combinations(task.devices, 2) if not a.reaches(b)]
    if missing:
        ways.append(f"a link between {', '.join(missing[:4])}, which have none")
    return (
        f"needs {single:.3g} GiB on device {device.name}, has {device.memory_gib:g}, and no layout over the fleet's "
        f"{len(task.devices)} devices fits either: try {' or '.join(ways)}"
    )


def _names(devices: tuple[Device, ...]) -> list[str]:
    return [device.name for device in devices]
