"""Which machine computes which layers, one after another, so that the next token comes soonest.

Time per output token = every machine's layers x its seconds for one + every link of the closed cycle, the last machine
sending the token back to the first. Memory caps each machine's layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from mycel.decisions.contract import Decision
from mycel.errors import EngineError

Path = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Cluster:
    """Unlike machines.

    Attributes
    ----------
    layers : int
        Of the model.
    room : tuple of int
        Most layers of each machine, weights and keys and values together.
    seconds : tuple of float
        Of one layer for one token, on each machine.
    links : tuple of tuple of float
        Seconds from machine to machine.
    """

    layers: int
    room: tuple[int, ...]
    seconds: tuple[float, ...]
    links: tuple[tuple[float, ...], ...]


class ShortestCycle(Decision[Cluster, Path]):
    """Greedy from every first machine, then local search until nothing gains.

    From a machine, go to the unused one whose link and computing time are least for the layers it takes, counting the
    way back when it ends the cycle. Then: shift layers between neighbours, put an unused machine in another's place,
    drop a machine whose layers fit elsewhere, turn a part of the order round.

    Parameters
    ----------
    starts : int
        Greedy cycles that are improved, the best ones first.
    """

    def __init__(self, starts: int = 8) -> None:
        self.starts = starts

    def decide(self, observation: Cluster) -> Path:
        """Return (machine, layers) in order; ``EngineError`` when memory does not suffice."""
        if sum(observation.room) < observation.layers:
            raise EngineError(f"{observation.layers} layers do not fit where {sum(observation.room)} do: add machines")
        cycles = [
            path
            for first in range(len(observation.room))
            if observation.room[first] and (path := greedy(observation, first))
        ]
        cycles.sort(key=lambda path: time_per_token(observation, path))
        return min(
            (improved(observation, path) for path in cycles[: self.starts]),
            key=lambda path: time_per_token(observation, path),
        )

    def fault(self, observation: Cluster, action: Path) -> str:
        """Machines stand once, hold no more than they have room for, and all layers are held."""
        machines = [machine for machine, _ in action]
        if len(set(machines)) != len(machines) or sum(count for _, count in action) != observation.layers:
            return f"{action} uses a machine twice or does not hold {observation.layers} layers"
        over = [machine for machine, count in action if not 0 < count <= observation.room[machine]]
        return f"machine {over[0]} has no room for its layers" if over else ""

    def cost(self, observation: Cluster, action: Path) -> float:
        """Return the seconds of one token."""
        return time_per_token(observation, action)


def time_per_token(cluster: Cluster, path: Path) -> float:
    """Return the seconds of every token after the first."""
    computing = sum(count * cluster.seconds[machine] for machine, count in path)
    order = [machine for machine, _ in path]
    hops = zip(order, order[1:] + order[:1], strict=True)
    return computing + (sum(cluster.links[a][b] for a, b in hops) if len(order) > 1 else 0.0)


def greedy(cluster: Cluster, first: int) -> Path:
    """Return the cycle that always takes the machine which is cheapest per layer next; empty when it runs out."""
    path = [(first, min(cluster.room[first], cluster.layers))]
    left = cluster.layers - path[0][1]
    unused = {machine for machine, room in enumerate(cluster.room) if room and machine != first}
    while left:
        here, best, least = path[-1][0], -1, float("inf")
        for machine in sorted(unused):
            count = min(cluster.room[machine], left)
            seconds = cluster.links[here][machine] + count * cluster.seconds[machine]
            seconds += cluster.links[machine][first] if count == left else 0.0
            if seconds / count < least:
                best, least = machine, seconds / count
        if best < 0:
            return ()
        unused.discard(best)
        path.append((best, min(cluster.room[best], left)))
        left -= path[-1][1]
    return tuple(path)


def improved(cluster: Cluster, path: Path) -> Path:
    """Return a cycle that no single step makes faster."""
    found, least = path, time_per_token(cluster, path)
    while True:
        best = min(_neighbours(cluster, found), key=lambda other: time_per_token(cluster, other), default=found)
        seconds = time_per_token(cluster, best)
        if seconds >= least - 1e-12:
            return found
        found, least = best, seconds


def _neighbours(cluster: Cluster, path: Path) -> list[Path]:
    others: list[Path] = []
    used = {machine for machine, _ in path}
    for place, (_, count) in enumerate(path):
        spare = [each for each, space in enumerate(cluster.room) if each not in used and space >= count]
        others += [(*path[:place], (unused, count), *path[place + 1 :]) for unused in spare]
        others += _shared_out(cluster, path, place, count)
    for start in range(len(path)):
        for end in range(start + 2, len(path) + 1):
            others.append((*path[:start], *reversed(path[start:end]), *path[end:]))
    return others


def _shared_out(cluster: Cluster, path: Path, place: int, most: int) -> list[Path]:
    """Return paths in which layers of one machine go to others, all of them if they fit."""
    found = []
    for count in {1, most}:
        left, counts = count, [held for _, held in path]
        order = sorted(
            (other for other in range(len(path)) if other != place), key=lambda o: cluster.seconds[path[o][0]]
        )
        for other in order:
            taken = min(left, cluster.room[path[other][0]] - counts[other])
            counts[other] += taken
            left -= taken
        counts[place] -= count
        if not left:
            found.append(tuple((machine, held) for (machine, _), held in zip(path, counts, strict=True) if held))
    return found
