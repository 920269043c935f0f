"""Which blocks: those that the swarm has least of, and whether to move once there is a better place."""

from __future__ import annotations

from dataclasses import dataclass

from mycel.decisions.contract import Decision
from mycel.errors import EngineError

Range = tuple[int, int]


@dataclass(frozen=True)
class Held:
    """What a peer serves: blocks ``first <= index < last``, each ``throughput`` tokens a second."""

    peer: str
    first: int
    last: int
    throughput: float


@dataclass(frozen=True)
class Situation:
    """What a peer sees when it chooses its blocks.

    Attributes
    ----------
    depth : int
        Blocks of the model.
    room : int
        Blocks that its memory holds.
    throughput : float
        Tokens a second that it would add to each block it serves.
    others : tuple of Held
        The other peers.
    now : tuple of int, optional
        What it serves already; None: it is joining.
    """

    depth: int
    room: int
    throughput: float
    others: tuple[Held, ...]
    now: Range | None = None


class Neediest(Decision[Situation, Range]):
    """The run of blocks that leaves the swarm's scarcest blocks best served.

    Placements are compared by the blocks' throughputs in ascending order: first the scarcest block, which is the
    swarm's throughput, then the next. A peer that serves already moves only for ``margin`` times that throughput.

    Parameters
    ----------
    margin : float
        Petals' servers move for 1.2.
    """

    def __init__(self, margin: float = 1.2) -> None:
        self.margin = margin

    def decide(self, observation: Situation) -> Range:
        """Return the blocks to serve; ``EngineError`` when there is room for none."""
        if observation.room < 1:
            raise EngineError("memory holds no block of this model: --memory must be raised")
        size = min(observation.room, observation.depth)
        choices = [(first, first + size) for first in range(observation.depth - size + 1)]
        best = max(choices, key=lambda choice: (served(observation, choice), -choice[0]))
        now = observation.now
        if now is not None and (self._worth(observation, best) <= self.margin * self._worth(observation, now)):
            return now
        return best

    def fault(self, observation: Situation, action: Range) -> str:
        """Blocks must exist and fit."""
        first, last = action
        if not 0 <= first < last <= observation.depth:
            return f"blocks {first} to {last} are none of the {observation.depth}"
        return (
            f"{last - first} blocks do not fit where {observation.room} do" if last - first > observation.room else ""
        )

    def cost(self, observation: Situation, action: Range) -> float:
        """Return the negative throughput of the swarm."""
        return -served(observation, action)[0]

    def _worth(self, observation: Situation, choice: Range) -> float:
        return served(observation, choice)[0]


def served(situation: Situation, choice: Range | None) -> list[float]:
    """Return the blocks' throughputs in ascending order when the peer serves ``choice``."""
    blocks = [0.0] * situation.depth
    mine = [Held("", *choice, situation.throughput)] if choice is not None else []
    for held in (*situation.others, *mine):
        for index in range(held.first, min(held.last, situation.depth)):
            blocks[index] += held.throughput
    return sorted(blocks)
