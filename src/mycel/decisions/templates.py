"""Pipelines for any number of nodes, made before they are needed, and which of them cover the nodes that are there.

Node template: units in order, cut into n stages whose slowest is as fast as can be. Iteration time of a pipeline of n
stages with b pieces: ``(b + n - 1) x slowest stage``. Source: Jang et al. 2023, sections 4.1 and 4.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from mycel.decisions.contract import Decision
from mycel.errors import EngineError


@dataclass(frozen=True)
class Template:
    """A pipeline of as many stages as there are ``stages``; each is (first unit, unit behind the last)."""

    stages: tuple[tuple[int, int], ...]
    slowest: float

    def seconds(self, pieces: int) -> float:
        """Return the time of a step with so many pieces."""
        return (pieces + len(self.stages) - 1) * self.slowest


def template(costs: Sequence[float], nodes: int) -> Template:
    """Cut units with ``costs`` into ``nodes`` stages, the slowest as fast as can be; exact."""
    count = len(costs)
    if not 0 < nodes <= count:
        raise EngineError(f"{count} units cannot be cut into {nodes} stages: at most one stage for each unit")
    before = [sum(costs[:place]) for place in range(count + 1)]

    @cache
    def best(first: int, stages: int) -> tuple[float, tuple[tuple[int, int], ...]]:
        if stages == 1:
            return before[count] - before[first], ((first, count),)
        found = []
        for last in range(first + 1, count - stages + 2):
            rest, ways = best(last, stages - 1)
            found.append((max(before[last] - before[first], rest), ((first, last), *ways)))
        return min(found)

    slowest, stages = best(0, nodes)
    return Template(stages, slowest)


def templates(costs: Sequence[float], least: int, most: int) -> dict[int, Template]:
    """Templates for every number of nodes from ``least`` to ``most``."""
    return {nodes: template(costs, nodes) for nodes in range(least, most + 1)}


@dataclass(frozen=True)
class Nodes:
    """What is to be covered.

    Attributes
    ----------
    count : int
        Nodes that are there.
    known : tuple of (int, Template)
        Templates by their number of nodes.
    pieces : int
        Micro-batches of a step, over all pipelines.
    faults : int
        Nodes that may die at once: so many pipelines more than one are wanted.
    """

    count: int
    known: tuple[tuple[int, Template], ...]
    pieces: int
    faults: int


Cover = tuple[int, ...]  # nodes of each pipeline, the largest first


class Covering(Decision[Nodes, Cover]):
    """The fastest set of templates that uses every node and survives ``faults``; exact by enumeration."""

    def decide(self, observation: Nodes) -> Cover:
        """Return each pipeline's number of nodes; ``EngineError`` when no set has enough pipelines."""
        found = [cover for cover in covers(observation) if not self.fault(observation, cover)]
        if not found:
            least = min(nodes for nodes, _ in observation.known)
            raise EngineError(
                f"{observation.count} nodes cannot make {observation.faults + 1} pipelines of at least {least}: "
                "add nodes, or expect fewer faults"
            )
        return min(found, key=lambda cover: (self.cost(observation, cover), len(cover)))

    def fault(self, observation: Nodes, action: Cover) -> str:
        """Every node is used, and enough pipelines hold every unit."""
        if sum(action) != observation.count:
            return f"{action} uses {sum(action)} of {observation.count} nodes"
        if len(action) <= observation.faults:
            return f"{len(action)} pipelines do not survive {observation.faults} faults"
        return "" if len(action) <= observation.pieces else "there are more pipelines than pieces of the batch"

    def cost(self, observation: Nodes, action: Cover) -> float:
        """Return the seconds of a step: those of the slowest pipeline, with pieces shared out as well as can be."""
        known = dict(observation.known)
        held = [known[nodes] for nodes in action]
        return max(map(Template.seconds, held, divided(held, observation.pieces)))


def covers(nodes: Nodes) -> Iterator[Cover]:
    """Every way to write the nodes as a sum of the templates' sizes, the largest first."""

    def rest(left: int, most: int) -> Iterator[Cover]:
        if not left:
            yield ()
        for size, _ in nodes.known:
            if size <= min(left, most):
                for more in rest(left - size, size):
                    yield (size, *more)

    yield from rest(nodes.count, nodes.count)


def divided(held: Sequence[Template], pieces: int) -> list[int]:
    """Share out pieces so that the slowest pipeline is as fast as can be; each gets at least one."""
    counts = [1] * len(held)
    for _ in range(pieces - len(held)):
        place = min(range(len(held)), key=lambda each: (held[each].seconds(counts[each] + 1), each))
        counts[place] += 1
    return counts
