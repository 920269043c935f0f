"""Planning on two levels: operators shard within a stage, stages share out the devices; both exactly.

Within a stage every operator takes one of its ways to be divided; a way costs seconds and bytes, and two neighbours
whose ways do not fit together pay for resharding. That is an integer programme (``Sharding``). Across stages a dynamic
programme cuts the chain and gives each stage its devices, for every bound on the slowest stage in turn (``Slicing``).

Zheng et al. 2022, "Alpa: Automating Inter- and Intra-Operator Parallelism for Distributed Deep Learning".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from math import inf

import numpy as np

from mycel.decisions.contract import Decision
from mycel.errors import RecipeError


@dataclass(frozen=True)
class Way:
    """One way to divide an operator: its seconds and bytes on each device."""

    name: str
    seconds: float
    bytes: float = 0.0


@dataclass(frozen=True)
class Operators:
    """Operators of a stage on given devices.

    Attributes
    ----------
    ways : tuple of tuple of Way
        Of each operator.
    edges : mapping of (int, int) to tuple of tuple of float
        For a result that goes from one operator to another: seconds of resharding, by both their ways.
    room : float
        Bytes of a device.
    """

    ways: tuple[tuple[Way, ...], ...]
    edges: Mapping[tuple[int, int], tuple[tuple[float, ...], ...]]
    room: float = inf


class Sharding(Decision[Operators, tuple[int, ...]]):
    """A way for every operator, by mixed-integer programming (HiGHS through SciPy)."""

    def decide(self, observation: Operators) -> tuple[int, ...]:
        """Return the ways' indices; ``RecipeError`` when none fit the memory."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        starts = np.cumsum([0, *(len(ways) for ways in observation.ways)])
        pairs = [(edge, s, t) for edge, table in observation.edges.items() for s, t in _cells(table)]
        count = int(starts[-1]) + len(pairs)
        costs = [way.seconds for ways in observation.ways for way in ways]
        costs += [observation.edges[edge][s][t] for edge, s, t in pairs]
        rows, low, high = [], [], []

        def demand(coefficients: Mapping[int, float], least: float, most: float) -> None:
            row = np.zeros(count)
            for column, value in coefficients.items():
                row[column] = value
            rows.append(row)
            low.append(least)
            high.append(most)

        for index, ways in enumerate(observation.ways):
            demand({int(starts[index]) + way: 1.0 for way in range(len(ways))}, 1, 1)
        # A pair of ways is taken exactly when both of its ends are.
        for edge in observation.edges:
            for side in (0, 1):
                for way in range(len(observation.ways[edge[side]])):
                    taken = {
                        int(starts[-1]) + place: 1.0
                        for place, (other, *ends) in enumerate(pairs)
                        if other == edge and ends[side] == way
                    }
                    demand(taken | {int(starts[edge[side]]) + way: -1.0}, 0, 0)
        if observation.room < inf:
            sizes = [way.bytes for ways in observation.ways for way in ways]
            demand(dict(enumerate(sizes)), 0, observation.room)
        whole = np.array([1] * int(starts[-1]) + [0] * len(pairs))
        found = milp(
            np.array(costs),
            integrality=whole,
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(np.array(rows), np.array(low), np.array(high))],
        )
        if not found.success:
            raise RecipeError(f"no way to divide the operators fits {observation.room:.3g} bytes a device")
        return tuple(
            int(np.argmax(found.x[starts[index] : starts[index + 1]])) for index in range(len(observation.ways))
        )

    def fault(self, observation: Operators, action: tuple[int, ...]) -> str:
        """Every operator takes one of its ways, and all fit the memory together."""
        if len(action) != len(observation.ways):
            return f"{len(action)} ways for {len(observation.ways)} operators"
        needed = sum(ways[way].bytes for ways, way in zip(observation.ways, action, strict=True))
        return f"needs {needed:.4g} bytes, has {observation.room:.4g}" if needed > observation.room * (1 + 1e-9) else ""

    def cost(self, observation: Operators, action: tuple[int, ...]) -> float:
        """Seconds of the operators and of resharding between them."""
        inside = sum(ways[way].seconds for ways, way in zip(observation.ways, action, strict=True))
        return inside + sum(table[action[a]][action[b]] for (a, b), table in observation.edges.items())


def _cells(table: tuple[tuple[float, ...], ...]) -> Iterator[tuple[int, int]]:
    yield from ((s, t) for s, row in enumerate(table) for t in range(len(row)))


def every_sharding(operators: Operators) -> Iterator[tuple[int, ...]]:
    """All choices of ways: the oracle."""
    yield from product(*(range(len(ways)) for ways in operators.ways))


@dataclass(frozen=True)
class Option:
    """A stage on so many devices: its seconds for a micro-batch, its fixed bytes, and those of each one in flight."""

    devices: int
    seconds: float
    fixed: float = 0.0
    each: float = 0.0


@dataclass(frozen=True)
class Sliced:
    """One stage of a plan: layers ``first <= index < last``, and how it is computed."""

    first: int
    last: int
    option: Option


@dataclass(frozen=True)
class Slices:
    """A chain of layers over equal devices.

    Attributes
    ----------
    options : mapping of (int, int) to tuple of Option
        For layers ``first <= index < last`` as one stage.
    """

    layers: int
    devices: int
    micro_batches: int
    room: float = inf
    options: Mapping[tuple[int, int], tuple[Option, ...]] = field(default_factory=dict)


class Slicing(Decision[Slices, tuple[Sliced, ...]]):
    """Stages and their devices, by dynamic programming under every bound on the slowest stage.

    Parameters
    ----------
    early : bool
        Stop at bounds that alone cost as much as the best plan found; the answer is the same.
    """

    def __init__(self, early: bool = True) -> None:
        self.early = early

    def decide(self, observation: Slices) -> tuple[Sliced, ...]:
        """Return the stages; ``RecipeError`` when no division uses all devices and fits."""
        bounds = sorted({option.seconds for options in observation.options.values() for option in options})
        best: tuple[float, tuple[Sliced, ...]] = (inf, ())
        for bound in bounds:
            if self.early and observation.micro_batches * bound >= best[0]:
                break
            stages = _within(observation, bound)
            if stages is not None and self.cost(observation, stages) < best[0]:
                best = self.cost(observation, stages), stages
        if not best[1]:
            raise RecipeError(
                f"no division of {observation.layers} layers over exactly {observation.devices} devices fits "
                f"{observation.room:.3g} bytes each: try more devices, recomputation or shorter rows"
            )
        return best[1]

    def fault(self, observation: Slices, action: tuple[Sliced, ...]) -> str:
        """Stages follow each other, use every device, and hold what is in flight."""
        edges = [0, *(stage.last for stage in action)]
        if [stage.first for stage in action] != edges[:-1] or edges[-1] != observation.layers:
            return "the stages do not follow each other from the first layer to the last"
        if sum(stage.option.devices for stage in action) != observation.devices:
            return f"the stages do not use exactly {observation.devices} devices"
        for behind, stage in enumerate(reversed(action)):
            if not fits(observation, stage.option, behind):
                return f"the stage of layers {stage.first} to {stage.last - 1} does not fit its memory"
        return ""

    def cost(self, observation: Slices, action: tuple[Sliced, ...]) -> float:
        """Seconds of a step: every stage once, and the slowest for each further micro-batch."""
        times = [stage.option.seconds for stage in action]
        return sum(times) + (observation.micro_batches - 1) * max(times)


def fits(slices: Slices, option: Option, behind: int) -> bool:
    """Whether a stage with so many stages behind it holds its micro-batches in flight (one forward, one back)."""
    flying = min(behind + 1, slices.micro_batches)
    return option.fixed + flying * option.each <= slices.room


def _within(slices: Slices, bound: float) -> tuple[Sliced, ...] | None:
    """Least sum of stage times with none above the bound, by number of stages, from the last layer backwards."""
    best: dict[tuple[int, int, int], tuple[float, Sliced | None]] = {(0, slices.layers, 0): (0.0, None)}
    for stages in range(1, min(slices.layers, slices.devices) + 1):
        for (first, last), options in slices.options.items():
            for option in options:
                if option.seconds > bound or not fits(slices, option, stages - 1):
                    continue
                for used in range(slices.devices - option.devices + 1):
                    behind = best.get((stages - 1, last, used))
                    if behind is None:
                        continue
                    key = stages, first, used + option.devices
                    total = behind[0] + option.seconds
                    if total < best.get(key, (inf, None))[0]:
                        best[key] = total, Sliced(first, last, option)
    ends = [key for key in best if key[1] == 0 and key[2] == slices.devices and key[0]]
    if not ends:
        return None
    key, found = min(ends, key=lambda each: best[each][0]), []
    while (stage := best[key][1]) is not None:
        found.append(stage)
        key = key[0] - 1, stage.last, key[2] - stage.option.devices
    return tuple(found)


def every_slicing(slices: Slices, first: int = 0, devices: int | None = None) -> Iterator[tuple[Sliced, ...]]:
    """All stages, with all options, that use every device, memory aside: the oracle."""
    devices = slices.devices if devices is None else devices
    if first == slices.layers:
        if not devices:
            yield ()
        return
    for last in range(first + 1, slices.layers + 1):
        for option in slices.options.get((first, last), ()):
            if option.devices <= devices:
                for rest in every_slicing(slices, last, devices - option.devices):
                    yield (Sliced(first, last, option), *rest)
