"""Unequal accelerators in one pipeline: the kinds' order, how wide each divides its matrices, and the stages' blocks.

Tensor ranks stay inside a node of one kind; kinds meet only where a stage hands on to the next. Kinds, orders and
widths are few and tried one by one; the blocks of the stages are the exact partition.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, permutations

from mycel.decisions.contract import Decision
from mycel.decisions.partition import Chain, Partition, StageCost
from mycel.decisions.timeline import Course, pipeline, simulate
from mycel.errors import RecipeError


@dataclass(frozen=True)
class Kind:
    """Accelerators of one maker.

    Attributes
    ----------
    count, node : int
        How many there are, and how many share a node.
    speed : float
        Operations a second of one.
    room : float
        Bytes of one.
    inside : float
        Bytes a second between accelerators of a node.
    """

    name: str
    count: int
    node: int
    speed: float
    room: float
    inside: float = 3e11


@dataclass(frozen=True)
class Mixed:
    """A model of equal blocks over kinds of accelerators.

    Attributes
    ----------
    flops, weights, states : float
        Of a block: operations of a micro-batch forward and back, bytes with gradient and moments, bytes kept for one
        micro-batch in flight.
    message : float
        Bytes that cross from stage to stage for a micro-batch.
    between : float
        Bytes a second between nodes and kinds.
    micro_batches : int
        Of a step, shared out over the data-parallel copies of the pipeline.
    """

    blocks: int
    flops: float
    weights: float
    states: float
    message: float
    between: float
    kinds: tuple[Kind, ...]
    micro_batches: int


@dataclass(frozen=True)
class Stage:
    """One stage: its kind, and how many accelerators divide its matrices."""

    kind: Kind
    tensor: int


@dataclass(frozen=True)
class Arrangement:
    """The pipeline's stages in order, their blocks, and how many copies of it there are."""

    stages: tuple[Stage, ...]
    split: tuple[int, ...]
    copies: int


class Arranging(Decision[Mixed, Arrangement]):
    """The arrangement of least step time over all accelerators.

    Parameters
    ----------
    even : bool
        Give every stage as many accelerators and blocks as the others, as planners for equal ones do.
    """

    def __init__(self, even: bool = False) -> None:
        self.even = even

    def decide(self, observation: Mixed) -> Arrangement:
        """Return the best of all arrangements; ``RecipeError`` when none fits."""
        found = [each for each in self.every(observation) if not self.fault(observation, each)]
        if not found:
            raise RecipeError(
                f"{observation.blocks} blocks fit no arrangement of {', '.join(k.name for k in observation.kinds)}: "
                "try more accelerators, more micro-batches or a smaller model"
            )
        return min(found, key=lambda each: self.cost(observation, each))

    def every(self, seen: Mixed) -> Iterator[Arrangement]:
        """Every order of the kinds, number of copies and width of each kind, with the best split."""
        for copies in range(1, min(kind.count for kind in seen.kinds) + 1):
            if seen.micro_batches % copies or any(kind.count % copies for kind in seen.kinds):
                continue
            for order in permutations(seen.kinds):
                for widths in _widths(order, copies):
                    if self.even and len(set(widths)) > 1:
                        continue
                    stages = tuple(
                        Stage(kind, width)
                        for kind, width in zip(order, widths, strict=True)
                        for _ in range(kind.count // copies // width)
                    )
                    split = self._split(seen, stages, copies)
                    if split is not None:
                        yield Arrangement(stages, split, copies)

    def _split(self, seen: Mixed, stages: tuple[Stage, ...], copies: int) -> tuple[int, ...] | None:
        if self.even:
            whole, more = divmod(seen.blocks, len(stages))
            return tuple(whole + (index < more) for index in range(len(stages))) if whole else None
        costs = tuple(
            StageCost(
                block_seconds(seen, stage), 0.0, room_of(seen, stage, len(stages) - place, seen.micro_batches // copies)
            )
            for place, stage in enumerate(stages)
        )
        try:
            return Partition().decide(Chain(seen.blocks, costs, seen.micro_batches // copies))
        except RecipeError:
            return None

    def fault(self, observation: Mixed, action: Arrangement) -> str:
        """Matrices are divided inside nodes, and every stage fits."""
        pieces = observation.micro_batches // action.copies
        for place, (stage, blocks) in enumerate(zip(action.stages, action.split, strict=True)):
            if stage.kind.node % stage.tensor:
                return f"{stage.tensor} tensor ranks do not stand inside one node of {stage.kind.name}"
            if blocks > room_of(observation, stage, len(action.stages) - place, pieces):
                return f"{blocks} blocks do not fit {stage.kind.name}"
        return ""

    def cost(self, observation: Mixed, action: Arrangement) -> float:
        """Predicted seconds of a step: sum over the stages and links, and the slowest for each further micro-batch."""
        times = [
            block_seconds(observation, stage) * blocks
            for stage, blocks in zip(action.stages, action.split, strict=True)
        ]
        pieces = observation.micro_batches // action.copies
        links = 2 * sum(travel_seconds(observation, action))
        return sum(times) + links + (pieces - 1) * max(times) + _exchange(observation, action)


def _widths(order: tuple[Kind, ...], copies: int) -> Iterator[tuple[int, ...]]:
    if not order:
        yield ()
        return
    kind, per_copy = order[0], order[0].count // copies
    for width in range(1, kind.node + 1):
        if kind.node % width == 0 and per_copy % width == 0:
            for rest in _widths(order[1:], copies):
                yield (width, *rest)


def block_seconds(seen: Mixed, stage: Stage) -> float:
    """Seconds of one block for one micro-batch, forward and back: its operations, and the sums of its tensor ranks."""
    width, kind = stage.tensor, stage.kind
    return seen.flops / (width * kind.speed) + 8 * seen.message * (width - 1) / width / kind.inside


def room_of(seen: Mixed, stage: Stage, behind: int, pieces: int) -> int:
    """Blocks that a stage's accelerators hold, with one micro-batch in flight for itself and each stage behind it."""
    each = (seen.weights + min(behind, pieces) * seen.states) / stage.tensor
    return int(stage.kind.room // each)


def travel_seconds(seen: Mixed, action: Arrangement) -> list[float]:
    """Seconds of a message from each stage to the next: inside a node where both stand in one."""
    found = []
    for before, after in pairwise(action.stages):
        near = before.kind == after.kind and before.tensor + after.tensor <= before.kind.node
        found.append(seen.message / (before.kind.inside if near else seen.between))
    return found


def _exchange(seen: Mixed, action: Arrangement) -> float:
    """Seconds in which the copies average the largest stage's gradients, a quarter of its bytes with moments."""
    sizes = [seen.weights / 4 * blocks / s.tensor for s, blocks in zip(action.stages, action.split, strict=True)]
    return 2 * (action.copies - 1) / action.copies * max(sizes) / seen.between


def simulated(seen: Mixed, action: Arrangement) -> Course:
    """Run one copy of the pipeline event by event, one forward, one back; a way back takes twice the way forward."""
    times = [block_seconds(seen, s) * blocks for s, blocks in zip(action.stages, action.split, strict=True)]
    links = [*travel_seconds(seen, action), 0.0]
    thirds = [seconds / 3 for seconds in times]
    return simulate(pipeline(thirds, [2 * third for third in thirds], links, seen.micro_batches // action.copies))
