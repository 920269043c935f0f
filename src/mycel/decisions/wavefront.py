"""Many tasks' submodules over equal devices: how many each gets, and in which waves they run.

A meta-operator is a run of ``layers`` equal operators, each of which takes T(n) seconds on n devices. Operators of a
level depend on none of the same level. For each level alone: the continuous optimum has all of them start and end
together, after C* with sum_m T_m^-1(C* / L_m) = N; each is then split into two runs on the nearest device counts that
exist; and waves of these runs fill the devices, each wave as long as its shortest run. Last, every run moves to where
its predecessors and the devices first let it start.

Wang et al. 2024, "Spindle: Efficient Distributed Training of Multi-Task Large Models via Wavefront Scheduling".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from mycel.decisions.contract import Decision
from mycel.errors import RecipeError


@dataclass(frozen=True)
class MetaOperator:
    """Equal operators in a row.

    Attributes
    ----------
    layers : int
        How many.
    seconds : tuple of (int, float)
        Of one of them on 1, 2, 4, ... devices; falling.
    after : tuple of int
        Meta-operators that must be done before.
    """

    name: str
    layers: int
    seconds: tuple[tuple[int, float], ...]
    after: tuple[int, ...] = ()

    def on(self, devices: int) -> float:
        """Seconds of one operator on a count of devices that exists."""
        return dict(self.seconds)[devices]

    def wanted(self, seconds: float) -> float:
        """Devices, a fraction of them too, on which one operator takes so long; one device may be shared in time."""
        first = self.seconds[0][1]
        if seconds >= first:
            return first / seconds
        for (low, slow), (high, fast) in pairwise(self.seconds):
            if seconds >= fast:
                return low + (high - low) * (slow - seconds) / (slow - fast)
        return float("inf")


@dataclass(frozen=True)
class Workload:
    """Meta-operators, sources before what needs them, and how many devices there are."""

    operators: tuple[MetaOperator, ...]
    devices: int

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the meta-operators by the longest way that leads to them."""
        depth: list[int] = []
        for operator in self.operators:
            depth.append(1 + max((depth[index] for index in operator.after), default=-1))
        return tuple(
            tuple(index for index, found in enumerate(depth) if found == level) for level in range(max(depth) + 1)
        )


@dataclass(frozen=True)
class Slot:
    """``layers`` operators of one meta-operator on ``devices``, from ``start`` on."""

    operator: int
    start: float
    devices: int
    layers: int


class Wavefront(Decision[Workload, tuple[Slot, ...]]):
    """Waves of malleable runs."""

    def decide(self, observation: Workload) -> tuple[Slot, ...]:
        """Return when and where everything runs; not later than with one meta-operator after another."""
        if any(operator.seconds[0][0] != 1 for operator in observation.operators):
            raise RecipeError("every operator must say how long it takes on one device")
        runs: list[tuple[int, int, int]] = []
        for level in observation.levels:
            runs += waves(observation, level)
        in_turn = [
            (index, observation.operators[index].seconds[-1][0], observation.operators[index].layers)
            for level in observation.levels
            for index in level
        ]
        ways = [_placed(observation, each) for each in (runs, in_turn)]
        return min(ways, key=lambda slots: self.cost(observation, slots))

    def fault(self, observation: Workload, action: tuple[Slot, ...]) -> str:
        """Devices suffice at any time, layers are all done once and in order, dependencies hold."""
        operators = observation.operators
        for index, operator in enumerate(operators):
            own = [slot for slot in action if slot.operator == index]
            if sum(slot.layers for slot in own) != operator.layers:
                return f"{operator.name} does not run its {operator.layers} layers once"
            ready = max((_end(observation, s) for s in action if s.operator in operator.after), default=0.0)
            for slot in sorted(own, key=lambda each: each.start):
                if slot.start < ready - 1e-9:
                    return f"{operator.name} starts before what it needs is there"
                ready = _end(observation, slot)
        for moment in {slot.start for slot in action}:
            busy = sum(s.devices for s in action if s.start <= moment + 1e-12 and _end(observation, s) > moment + 1e-9)
            if busy > observation.devices:
                return f"{busy} of {observation.devices} devices are busy at {moment:.3g} s"
        return ""

    def cost(self, observation: Workload, action: tuple[Slot, ...]) -> float:
        """Seconds until all is done."""
        return max(_end(observation, slot) for slot in action)


def _end(workload: Workload, slot: Slot) -> float:
    return slot.start + slot.layers * workload.operators[slot.operator].on(slot.devices)


def continuous(workload: Workload, level: Sequence[int]) -> float:
    """C*: the least seconds of a level if devices and layers could be divided at will."""
    operators = [workload.operators[index] for index in level]
    low = max(operator.layers * operator.seconds[-1][1] for operator in operators)
    high = sum(operator.layers * operator.seconds[0][1] for operator in operators)
    if sum(operator.wanted(low / operator.layers) for operator in operators) <= workload.devices:
        return low
    for _ in range(100):
        middle = (low + high) / 2
        wanted = sum(operator.wanted(middle / operator.layers) for operator in operators)
        low, high = (middle, high) if wanted > workload.devices else (low, middle)
    return high


def level_bound(workload: Workload) -> float:
    """Sum of the levels' continuous optima: what the published schedule is held against."""
    return sum(continuous(workload, level) for level in workload.levels)


def least(workload: Workload) -> float:
    """No schedule of any kind is faster: all work at its cheapest on every device; the longest chain at its fastest."""
    work, ends = 0.0, list[float]()
    for operator in workload.operators:
        work += operator.layers * min(count * seconds for count, seconds in operator.seconds)
        fastest = operator.layers * min(seconds for _, seconds in operator.seconds)
        ends.append(fastest + max((ends[index] for index in operator.after), default=0.0))
    return max(work / workload.devices, *ends)


def one_after_another(workload: Workload) -> float:
    """Seconds when each meta-operator has all devices to itself, as systems for one task run it."""
    return sum(operator.layers * operator.seconds[-1][1] for operator in workload.operators)


def two_runs(operator: MetaOperator, seconds: float) -> list[tuple[int, int]]:
    """(devices, layers) on the counts next to the continuous optimum, which together take about as long."""
    wanted = operator.wanted(seconds / operator.layers)
    if wanted <= 1:
        return [(1, operator.layers)]
    counts = [count for count, _ in operator.seconds]
    low = max(count for count in counts if count <= wanted + 1e-9)
    high = min((count for count in counts if count >= wanted - 1e-9), default=low)
    if low == high:
        return [(low, operator.layers)]
    slow, fast = operator.on(low), operator.on(high)
    wide = min(operator.layers, max(0, round((operator.layers * slow - seconds) / (slow - fast))))
    return [(count, layers) for count, layers in ((high, wide), (low, operator.layers - wide)) if layers]


def waves(workload: Workload, level: Sequence[int]) -> list[tuple[int, int, int]]:
    """(meta-operator, devices, layers) in the order of a level's waves."""
    best = continuous(workload, level)
    left = {index: two_runs(workload.operators[index], best) for index in level}
    found = []
    while any(left.values()):
        wave = _proposed(workload, left)
        # Align: the shortest run ends the wave, longer ones go on in the next.
        length = min(workload.operators[index].on(count) * layers for index, (count, layers) in wave.items())
        for index, (count, layers) in wave.items():
            done = min(layers, max(1, int(length / workload.operators[index].on(count) + 1e-9)))
            found.append((index, count, done))
            left[index] = _without(left[index], done)
    return found


def _proposed(workload: Workload, left: dict[int, list[tuple[int, int]]]) -> dict[int, tuple[int, int]]:
    """Runs that fill the devices, most remaining time first; devices left over widen those that have most to do."""
    operators, free = workload.operators, workload.devices
    remaining = {
        index: sum(operators[index].on(count) * layers for count, layers in runs)
        for index, runs in left.items()
        if runs
    }
    order = sorted(remaining, key=lambda index: (-remaining[index], index))
    wave: dict[int, tuple[int, int]] = {}
    for index in order:
        count, layers = left[index][0]
        if count <= free:
            wave[index] = count, layers
            free -= count
    for index in order:
        if index not in wave:
            fitting = [count for count, _ in operators[index].seconds if count <= free]
            if fitting:
                wave[index] = fitting[-1], left[index][0][1]
                free -= fitting[-1]
    for index in order:
        if index in wave:
            count, layers = wave[index]
            wider = [more for more, _ in operators[index].seconds if count < more <= count + free]
            if wider:
                wave[index] = wider[-1], layers
                free -= wider[-1] - count
    return wave


def _without(runs: list[tuple[int, int]], done: int) -> list[tuple[int, int]]:
    count, layers = runs[0]
    return ([(count, layers - done)] if layers > done else []) + runs[1:]


def _placed(workload: Workload, runs: Sequence[tuple[int, int, int]]) -> tuple[Slot, ...]:
    """Start every run as early as its predecessors and the devices allow, in the order of the waves."""
    slots: list[Slot] = []
    done: dict[int, float] = {}
    for index, count, layers in runs:
        operator = workload.operators[index]
        ready = max([done.get(index, 0.0), *(done[before] for before in operator.after)])
        seconds = layers * operator.on(count)
        ends = sorted({ready, *(end for slot in slots if (end := _end(workload, slot)) > ready)})
        start = next(moment for moment in ends if _room(workload, slots, moment, seconds) >= count)
        slots.append(Slot(index, start, count, layers))
        done[index] = start + seconds
    return tuple(slots)


def _room(workload: Workload, slots: Sequence[Slot], start: float, seconds: float) -> int:
    """Fewest devices that are free at any time of a span."""
    inside = [s for s in slots if s.start < start + seconds - 1e-9 and _end(workload, s) > start + 1e-9]
    moments = {start, *(slot.start for slot in inside if slot.start > start)}
    busy = [
        sum(s.devices for s in inside if s.start <= moment + 1e-12 and _end(workload, s) > moment + 1e-9)
        for moment in moments
    ]
    return workload.devices - max(busy)
