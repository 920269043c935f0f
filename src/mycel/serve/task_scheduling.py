"""Task scheduling for decentralised serving: layers over unlike machines, so that the next token comes soonest.

Ren, "Task Scheduling for Decentralized LLM Serving in Heterogeneous Networks", technical report, 2024.

Given machines of unlike memory and speed and the latency between every two, assign the layers as a closed pipeline
whose time per output token - computing plus links, the last back to the first - is least. Runs again when a machine
comes or leaves. With one machine that holds everything the cycle has no links.

Not verified: the report's heuristic is known from its abstract; ours is a greedy shortest path from every first
machine with local search behind it (``decisions.schedule``). Its integer programme is represented by trying
everything on small cases, and by random search under the same time on large ones.
"""

from __future__ import annotations

import itertools
import random
import time

from mycel.decisions.schedule import Cluster, ShortestCycle, time_per_token
from mycel.rounds.laboratory import Laboratory, Measured

SMALL = 30


def exact(cluster: Cluster) -> float:
    """Return the least time per token, by trying every order of machines and every way to share out the layers."""
    best = float("inf")
    machines = range(len(cluster.room))
    for size in range(1, len(cluster.room) + 1):
        for order in itertools.permutations(machines, size):
            if order[0] != min(order):  # a cycle may begin anywhere
                continue
            left, counts = cluster.layers - size, dict.fromkeys(order, 1)
            if left < 0 or any(not cluster.room[machine] for machine in order):
                continue
            # For a given cycle the links are fixed, and the fastest machines take all they have room for.
            for machine in sorted(order, key=lambda each: cluster.seconds[each]):
                more = min(left, cluster.room[machine] - 1)
                counts[machine] += more
                left -= more
            if not left:
                best = min(best, time_per_token(cluster, tuple((machine, counts[machine]) for machine in order)))
    return best


def cluster(source: random.Random, machines: int, layers: int) -> Cluster:
    """Return a random cluster that holds the model: places on a map, memory and speed over a factor of four."""
    while True:
        room = tuple(source.randint(max(1, layers // machines), max(2, layers // 2)) for _ in range(machines))
        if sum(room) >= layers:
            break
    spots = [(source.random(), source.random()) for _ in range(machines)]
    links = tuple(
        tuple(0.002 + 0.05 * ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) ** 0.5 if a != b else 0.0 for b in spots)
        for a in spots
    )
    return Cluster(layers, room, tuple(source.uniform(0.002, 0.008) for _ in range(machines)), links)


def claim(lab: Laboratory) -> Measured:
    """Compare with the exact answer where it can be had, and with random search where it cannot."""
    source, decision = random.Random(0), ShortestCycle()
    ratios = []
    for _ in range(SMALL):
        small = cluster(source, source.randint(2, 6), 8)
        ratios.append(decision.cost(small, decision.decide(small)) / exact(small))
    large = cluster(source, 200, 80)
    started = time.perf_counter()
    found = decision.cost(large, decision.decide(large))
    seconds = time.perf_counter() - started
    guessed = _random_search(large, source, seconds)
    median = sorted(ratios)[SMALL // 2]
    return Measured(
        f"{max(ratios):.3f} times the least possible at worst, {median:.3f} in the middle, over {SMALL} clusters;"
        f" 200 machines and 80 layers in {seconds:.2f} s, {found * 1e3:.0f} ms a token against {guessed * 1e3:.0f} by"
        " random search of that time",
        max(ratios) <= 1.1 and median <= 1.0 + 1e-9 and seconds < 1.0 and found < guessed,
        {"worst": max(ratios), "median": median, "seconds": seconds, "found": found, "random": guessed},
    )


def _random_search(large: Cluster, source: random.Random, seconds: float) -> float:
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        order, path, left = list(range(len(large.room))), [], large.layers
        source.shuffle(order)
        for machine in order:
            count = min(left, large.room[machine])
            path.append((machine, count))
            left -= count
            if not left:
                break
        best = min(best, time_per_token(large, tuple(path)))
    return best
