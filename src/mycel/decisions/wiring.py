"""Which peer of a stage serves the next micro-batch, and which peer moves to another stage.

Ryabinin et al. 2023, "SWARM Parallelism: Training Large Models Can Be Surprisingly Communication-Efficient".
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from math import prod

from mycel.decisions.contract import Decision
from mycel.errors import EngineError


@dataclass
class Wiring:
    """Interleaved weighted round-robin: peers are chosen in proportion to how fast they lately answered.

    Each peer has a mark, the time it would have worked so far; the least mark is chosen and moves by the seconds that
    the peer takes for one request. Marks begin at chance places, so that different owners do not all begin alike.

    Parameters
    ----------
    smoothing : float
        Weight of the newest observation in the running mean of a peer's seconds.
    """

    seed: int
    smoothing: float = 0.3
    seconds: dict[str, float] = field(default_factory=dict)
    _marks: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)

    def join(self, peer: str, seconds: float) -> None:
        """Take a peer in, with what it says it takes; it begins where the others are, not where it would catch up."""
        self.seconds[peer] = seconds
        self._marks[peer] = min(self._marks.values(), default=0.0) + self._chance.random() * seconds

    def leave(self, peer: str) -> None:
        """Forget a peer."""
        self.seconds.pop(peer, None)
        self._marks.pop(peer, None)

    def observed(self, peer: str, seconds: float) -> None:
        """Take note of how long a request took."""
        if peer in self.seconds:
            self.seconds[peer] += self.smoothing * (seconds - self.seconds[peer])

    def choose(self) -> str:
        """Return the peer of the next request; ``EngineError`` when the stage has none."""
        if not self._marks:
            raise EngineError("a stage has no peer left: its blocks are lost until one joins it")
        peer = min(self._marks, key=lambda name: (self._marks[name], name))
        self._marks[peer] += self.seconds[peer]
        return peer


@dataclass(frozen=True)
class Crew:
    """Throughputs of each stage's peers, in requests a second."""

    stages: tuple[tuple[float, ...], ...]


Move = tuple[int, int, int]  # stage, place in it, stage to go to


class Rebalance(Decision[Crew, tuple[Move, ...]]):
    """One peer from the stage with most to spare to the slowest one, while that makes the slowest faster.

    The swarm is as fast as its slowest stage. The peer is the one whose move raises that most; nobody leaves a stage
    empty, and nobody moves for less than ``margin``, for weights have to be fetched.
    """

    def __init__(self, margin: float = 1.05) -> None:
        self.margin = margin

    def decide(self, observation: Crew) -> tuple[Move, ...]:
        """Return the move, or none."""
        to = min(range(len(observation.stages)), key=lambda stage: sum(observation.stages[stage]))
        moves = [
            (stage, place, to)
            for stage, peers in enumerate(observation.stages)
            for place in range(len(peers))
            if stage != to and len(peers) > 1
        ]
        best = max(moves, key=lambda move: self._worth(moved(observation, move)), default=None)
        if best is None:
            return ()
        # Where several stages are slowest, helping one of them makes nothing faster yet, and is the way to it.
        pairs = zip(self._worth(observation), self._worth(moved(observation, best)), strict=True)
        now, after = next(((now, after) for now, after in pairs if now != after), (0.0, 0.0))
        return (best,) if after > self.margin * now else ()

    def fault(self, observation: Crew, action: tuple[Move, ...]) -> str:
        """A peer that is there moves to another stage."""
        for stage, place, to in action:
            if stage == to or place >= len(observation.stages[stage]):
                return f"peer {place} of stage {stage} cannot move to {to}"
        return ""

    def cost(self, observation: Crew, action: tuple[Move, ...]) -> float:
        """Seconds of a request through the slowest stage."""
        for move in action:
            observation = moved(observation, move)
        slowest = throughput(observation)
        return 1 / slowest if slowest else float("inf")

    def _worth(self, crew: Crew) -> list[float]:
        return sorted(sum(peers) for peers in crew.stages)


def throughput(crew: Crew) -> float:
    """Requests a second of the slowest stage."""
    return min(sum(peers) for peers in crew.stages)


def moved(crew: Crew, move: Move) -> Crew:
    """Return the crew after a move."""
    stage, place, to = move
    stages = [list(peers) for peers in crew.stages]
    stages[to].append(stages[stage].pop(place))
    return Crew(tuple(tuple(peers) for peers in stages))


def settled(crew: Crew, rule: Rebalance | None = None) -> tuple[Crew, int]:
    """Move peers until nobody wants to; return the crew then and the moves."""
    rule, count = rule or Rebalance(), 0
    while moves := rule.decide(crew):
        crew, count = moved(crew, moves[0]), count + 1
    return crew, count


def best_throughput(crew: Crew) -> float:
    """The most that any assignment of the same peers to the stages reaches: the oracle, for equal or few peers."""
    peers, stages = sorted(each for held in crew.stages for each in held), len(crew.stages)
    if len(set(peers)) == 1:
        return peers[0] * (len(peers) // stages)
    assert stages ** len(peers) < 1 << 20, f"{prod([stages] * len(peers))} assignments are too many to try"
    best = {(0.0,) * stages}
    for peer in peers:
        best = {
            tuple(sorted(sum_ + peer * (index == stage) for index, sum_ in enumerate(sums)))
            for sums in best
            for stage in range(stages)
        }
    return max(min(sums) for sums in best)
