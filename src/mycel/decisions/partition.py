"""Consecutive blocks to consecutive devices: the exact dynamic programme, two oracles, and a heuristic for large cases.

A stage takes ``extra + blocks * each`` seconds for a micro-batch; with M of them a step takes the sum over the stages
plus ``(M - 1)`` times the slowest (GPipe and 1F1B alike). A stage may hold at most ``room`` blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from mycel.decisions.contract import Decision
from mycel.errors import RecipeError


@dataclass(frozen=True)
class StageCost:
    """What a device takes as a stage.

    Attributes
    ----------
    each : float
        Seconds of one block for one micro-batch, forward and back.
    extra : float
        Seconds of what the stage does besides: embedding, head, and its message to the next.
    room : int
        Most blocks that its memory holds.
    """

    each: float
    extra: float = 0.0
    room: int = 1 << 30


@dataclass(frozen=True)
class Chain:
    """So many blocks for these stages in this order, and so many micro-batches."""

    blocks: int
    stages: tuple[StageCost, ...]
    micro_batches: int


class Partition(Decision[Chain, tuple[int, ...]]):
    """Blocks of each stage, by trying every slowest stage and filling the others at least total cost.

    For a bound on the slowest stage, the stages' sum is least when cheap stages are full first; the bounds worth trying
    are the times that some stage can take.
    """

    def decide(self, observation: Chain) -> tuple[int, ...]:
        """Return the split of least step time; ``RecipeError`` when the blocks do not fit."""
        best: tuple[float, tuple[int, ...]] | None = None
        times = {
            stage.extra + count * stage.each
            for stage in observation.stages
            for count in range(1, min(observation.blocks, stage.room) + 1)
        }
        for bound in sorted(times):
            split = _filled(observation, bound)
            if split is not None:
                candidate = (self.cost(observation, split), split)
                best = candidate if best is None or candidate < best else best
        if best is None:
            room = sum(min(stage.room, observation.blocks) for stage in observation.stages)
            raise RecipeError(
                f"{observation.blocks} blocks do not fit: the {len(observation.stages)} stages have room for {room} in "
                "all and each needs at least one: add a device, or try recomputation or a shorter data.max_length"
            )
        return best[1]

    def fault(self, observation: Chain, action: tuple[int, ...]) -> str:
        """Every block once, at least one a stage, within its room."""
        if len(action) != len(observation.stages) or sum(action) != observation.blocks or min(action) < 1:
            return f"{action} does not share {observation.blocks} blocks out over {len(observation.stages)} stages"
        over = [index for index, count in enumerate(action) if count > observation.stages[index].room]
        return f"stage {over[0]} has room for {observation.stages[over[0]].room} blocks" if over else ""

    def cost(self, observation: Chain, action: tuple[int, ...]) -> float:
        """Seconds of a step."""
        times = stage_times(observation, action)
        return sum(times) + (observation.micro_batches - 1) * max(times)


def stage_times(chain: Chain, split: Sequence[int]) -> list[float]:
    """Seconds of every stage for one micro-batch."""
    return [stage.extra + count * stage.each for stage, count in zip(chain.stages, split, strict=True)]


def _filled(chain: Chain, bound: float) -> tuple[int, ...] | None:
    slack = 1e-12 * max(1.0, bound)
    most = [
        min(stage.room, int((bound + slack - stage.extra) / stage.each) if stage.each else chain.blocks)
        for stage in chain.stages
    ]
    if min(most) < 1 or sum(most) < chain.blocks:
        return None
    split = [1] * len(most)
    left = chain.blocks - len(split)
    if left < 0:
        return None
    for index in sorted(range(len(most)), key=lambda stage: chain.stages[stage].each):
        taken = min(left, most[index] - 1)
        split[index] += taken
        left -= taken
    return tuple(split) if not left else None


class Proportional(Partition):
    """HetHub's way for large cases: in proportion to speed, then single blocks from the slowest stage elsewhere."""

    def decide(self, observation: Chain) -> tuple[int, ...]:
        """Return a split that no single move improves."""
        speeds = [1 / max(stage.each, 1e-30) for stage in observation.stages]
        split = [
            max(1, min(stage.room, int(observation.blocks * speed / sum(speeds))))
            for stage, speed in zip(observation.stages, speeds, strict=True)
        ]
        while sum(split) != observation.blocks:
            step = 1 if sum(split) < observation.blocks else -1
            able = [
                index
                for index, count in enumerate(split)
                if (count < observation.stages[index].room if step > 0 else count > 1)
            ]
            if not able:
                return super().decide(observation)
            after = [self.cost(observation, tuple(_moved(split, index, step))) for index in able]
            split[able[after.index(min(after))]] += step
        while (better := self._improved(observation, split)) is not None:
            split = better
        return tuple(split)

    def _improved(self, chain: Chain, split: list[int]) -> list[int] | None:
        times = stage_times(chain, split)
        slowest = times.index(max(times))
        moves = [
            _moved(_moved(split, slowest, -1), index, 1)
            for index, count in enumerate(split)
            if index != slowest and split[slowest] > 1 and count < chain.stages[index].room
        ]
        best = min(moves, key=lambda move: self.cost(chain, tuple(move)), default=None)
        better = best is not None and self.cost(chain, tuple(best)) < self.cost(chain, tuple(split)) * (1 - 1e-12)
        return best if better else None


def _moved(split: Sequence[int], index: int, step: int) -> list[int]:
    changed = list(split)
    changed[index] += step
    return changed


def every_split(blocks: int, stages: int) -> Iterator[tuple[int, ...]]:
    """All ways to share blocks out over stages, at least one each: the oracle by enumeration."""
    for cuts in combinations(range(1, blocks), stages - 1):
        edges = (0, *cuts, blocks)
        yield tuple(edges[index + 1] - edges[index] for index in range(stages))


def by_integer_programme(chain: Chain) -> tuple[tuple[int, ...], float]:
    """Split and seconds by mixed-integer programming (HiGHS through SciPy): the oracle for middle-sized cases."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    count = len(chain.stages)
    each = np.array([stage.each for stage in chain.stages])
    extra = np.array([stage.extra for stage in chain.stages])
    # Variables: the blocks of every stage, then the slowest stage's seconds.
    objective = np.array([*each, chain.micro_batches - 1])
    blocks = np.array([*np.ones(count), 0])
    slower = np.hstack([np.diag(each), -np.ones((count, 1))])
    room = [min(stage.room, chain.blocks) for stage in chain.stages]
    found = milp(
        objective,
        integrality=blocks,
        bounds=Bounds(blocks, np.array([*room, np.inf])),
        constraints=[
            LinearConstraint(blocks, chain.blocks, chain.blocks),
            LinearConstraint(slower, -np.inf, -extra),
        ],
    )
    if not found.success:
        raise RecipeError(f"the blocks cannot be shared out: {found.message}")
    return tuple(int(value + 0.5) for value in found.x[:count]), float(found.fun + extra.sum())
