"""Operators over far-apart devices: group the devices by their links, cross slow links once, and squeeze those alone.

A decoder is a graph of operators, residual edges included; what crosses a cut is every result that is needed behind it.
Devices are clustered by bandwidth (Louvain), clusters stand in the order whose narrowest link is widest, and the
operators are cut into consecutive slices so that the largest of any device's computing and incoming transfer is least.

Tang et al. 2024, "FusionLLM: A Decentralized LLM Training System on Geo-distributed GPUs with Adaptive Compression".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from math import inf

from mycel.decisions.contract import Decision
from mycel.decisions.graph import Graph
from mycel.errors import RecipeError

LARGE = 6  # clusters, or devices of a cluster, up to which every order is tried


@dataclass(frozen=True)
class Piece:
    """An operator: seconds on a device of speed 1, bytes it holds, bytes of its result, and whose results it needs."""

    seconds: float
    held: float
    result: float
    needs: tuple[int, ...]


@dataclass(frozen=True)
class Spread:
    """Operators in the order of computing, and devices apart.

    Attributes
    ----------
    speeds, room : tuple of float
        Of each device.
    bandwidth : tuple of tuple of float
        Bytes a second between every two devices.
    latency : float
        Seconds of any message.
    """

    pieces: tuple[Piece, ...]
    speeds: tuple[float, ...]
    room: tuple[float, ...]
    bandwidth: tuple[tuple[float, ...], ...]
    latency: float = 0.0


Fenced = tuple[tuple[int, int, int], ...]  # device, first and last operator of its slice


class Fence(Decision[Spread, Fenced]):
    """Slices of operators for the devices, slow links crossed as seldom as there are clusters to join."""

    def decide(self, observation: Spread) -> Fenced:
        """Return (device, first, last) in the order of computing; ``RecipeError`` when memory does not suffice."""
        order = [device for cluster in ordered_clusters(observation) for device in cluster]
        found = best_slices(observation, order)
        if found is None:
            held, room = sum(piece.held for piece in observation.pieces), sum(observation.room)
            raise RecipeError(
                f"the operators hold {held:.3g} bytes, the {len(order)} devices {room:.3g}, and no slices fit: "
                "add a device or try a smaller model"
            )
        return found

    def fault(self, observation: Spread, action: Fenced) -> str:
        """Slices follow each other, no device stands twice, and each holds its own."""
        edges = [0, *(last for _, _, last in action)]
        if [first for _, first, _ in action] != edges[:-1] or edges[-1] != len(observation.pieces):
            return "the slices do not follow each other from the first operator to the last"
        if len({device for device, _, _ in action}) != len(action):
            return "a device stands twice"
        over = [d for d, first, last in action if _held(observation, first, last) > observation.room[d]]
        return f"device {over[0]} has no room for its slice" if over else ""

    def cost(self, observation: Spread, action: Fenced) -> float:
        """Seconds of the slowest: a device's computing or what comes in to it."""
        times = [_computing(observation, device, first, last) for device, first, last in action]
        times += [transfer(observation, a[0], b[0], b[1]) for a, b in pairwise(action)]
        return max(times)


def crossing(pieces: Sequence[Piece], cut: int) -> float:
    """Bytes of the results before a cut that operators behind it need, each counted once."""
    needed = {source for piece in pieces[cut:] for source in piece.needs if source < cut}
    return sum(pieces[source].result for source in needed)


def transfer(seen: Spread, before: int, after: int, cut: int) -> float:
    """Seconds of what crosses a cut between two devices."""
    return seen.latency + crossing(seen.pieces, cut) / seen.bandwidth[before][after]


def clusters(seen: Spread) -> list[list[int]]:
    """Devices grouped by bandwidth: communities of the graph whose edges weigh as much as their links carry."""
    import networkx

    graph = networkx.Graph()
    graph.add_nodes_from(range(len(seen.speeds)))
    for a, row in enumerate(seen.bandwidth):
        graph.add_weighted_edges_from((a, b, width) for b, width in enumerate(row) if b > a)
    found = networkx.community.louvain_communities(graph, weight="weight", seed=0)
    return sorted(sorted(group) for group in found)


def ordered_clusters(seen: Spread) -> list[list[int]]:
    """Clusters along the path whose narrowest link is widest, the devices inside each along theirs."""

    def between(a: Sequence[int], b: Sequence[int]) -> float:
        return max(seen.bandwidth[x][y] for x in a for y in b)

    groups = clusters(seen)
    order = _widest([(index,) for index in range(len(groups))], lambda a, b: between(groups[a[0]], groups[b[0]]))
    found = []
    for (index,) in order:
        inside = _widest([(device,) for device in groups[index]], between)
        found.append([device for (device,) in inside])
    return found


def _widest(
    nodes: list[tuple[int, ...]], width: Callable[[tuple[int, ...], tuple[int, ...]], float]
) -> list[tuple[int, ...]]:
    def widths(order: Sequence[tuple[int, ...]]) -> list[float]:
        return sorted(width(a, b) for a, b in pairwise(order))

    if len(nodes) <= LARGE:
        widest = max(permutations(nodes), key=widths)
        return list(widest)
    order, left = [nodes[0]], nodes[1:]
    while left:
        best = max(left, key=lambda node: width(order[-1], node))
        order.append(best)
        left.remove(best)
    return order


def best_slices(seen: Spread, order: Sequence[int]) -> Fenced | None:
    """Slices for devices in a given order that make the slowest fastest; a device may be left out."""
    count = len(seen.pieces)
    # The best so far, by operators done and the device that did the last of them.
    best: dict[tuple[int, int], tuple[float, Fenced]] = {(0, -1): (0.0, ())}
    for device in order:
        for (done, before), (slowest, slices) in list(best.items()):
            incoming = transfer(seen, before, device, done) if before >= 0 and done < count else 0.0
            for last in range(done + 1, count + 1):
                if _held(seen, done, last) > seen.room[device]:
                    break
                time = max(slowest, incoming, _computing(seen, device, done, last))
                if time < best.get((last, device), (inf, ()))[0]:
                    best[last, device] = time, (*slices, (device, done, last))
    ends = [value for (done, _), value in best.items() if done == count]
    return min(ends)[1] if ends else None


def _computing(seen: Spread, device: int, first: int, last: int) -> float:
    return sum(piece.seconds for piece in seen.pieces[first:last]) / seen.speeds[device]


def _held(seen: Spread, first: int, last: int) -> float:
    return sum(piece.held for piece in seen.pieces[first:last])


def keeping(seconds: Sequence[float], ratio: float, overhead: float) -> list[float]:
    """Share of the entries that each link keeps, so that the slowest really carries ``ratio`` times fewer bytes.

    Parameters
    ----------
    seconds : sequence of float
        Of each link's transfer, uncompressed.
    overhead : float
        Bytes of a kept entry with its place over those of an entry; links that would be squeezed less stay dense.
    """
    slowest = max(seconds, default=0.0)
    wanted = [overhead * ratio * each / slowest if slowest else 1.0 for each in seconds]
    return [1.0 if each <= overhead else 1 / each for each in wanted]


def operators(graph: Graph, tokens: int, speed: float) -> tuple[Piece, ...]:
    """A decoder's operators for so many tokens, six a block: two norms, attention, feed-forward part and two sums."""
    state, block = 4.0 * tokens * graph.hidden, graph.blocks[0]
    share = 4 * graph.hidden**2 / block.weights
    pieces = [Piece(0.0, 16.0 * graph.operators[0].weights, state, ())]
    for _ in graph.blocks:
        for part in (share, 1 - share):
            entering = len(pieces) - 1
            seconds = 3 * block.flops * part * tokens / speed
            pieces.append(Piece(0.0, 16.0 * graph.hidden, state, (entering,)))
            pieces.append(Piece(seconds, 16.0 * block.weights * part, state, (entering + 1,)))
            pieces.append(Piece(0.0, 0.0, state, (entering, entering + 2)))  # the residual edge goes round both
    head = graph.operators[-1]
    pieces.append(Piece(3 * head.flops * tokens / speed, 16.0 * head.weights, 0.0, (len(pieces) - 1,)))
    return tuple(pieces)
