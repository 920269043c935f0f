"""Spindle: tasks of several modalities share devices in waves, each submodule as wide as it scales.

Wang et al. 2024, "Spindle: Efficient Distributed Training of Multi-Task Large Models via Wavefront Scheduling"
(catalogue number 55). Consecutive equal operators are contracted into meta-operators, levels follow from what needs
what, an estimator says how each scales, and ``decisions.wavefront`` allots devices and orders the waves.

Ours beside the paper: after the waves are laid out, every run starts as soon as what it needs and its devices allow,
across waves and levels; and the estimator is one curve alpha + beta / n, fitted to some counts and held to another.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from mycel.decisions.wavefront import MetaOperator, Wavefront, Workload, least, level_bound, one_after_another
from mycel.rounds.laboratory import Laboratory, Measured

COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Operator:
    """One operator of a task's graph: what kind, on how large an input, and which operators it needs."""

    kind: str
    size: int
    needs: tuple[int, ...] = ()


def contracted(operators: Sequence[Operator]) -> list[tuple[Operator, int, tuple[int, ...]]]:
    """Fuse chains of equal operators; return (operator, how many, indices of what it needs) of each that is left."""
    used = [0] * len(operators)
    for operator in operators:
        for source in operator.needs:
            used[source] += 1
    made: list[tuple[Operator, int, tuple[int, ...]]] = []
    place: list[int] = []
    for operator in operators:
        source = operator.needs[0] if len(operator.needs) == 1 else -1
        before = operators[source] if source >= 0 else None
        alike = before is not None and (before.kind, before.size) == (operator.kind, operator.size)
        if alike and used[source] == 1:
            first, count, needs = made[place[source]]
            made[place[source]] = first, count + 1, needs
            place.append(place[source])
        else:
            made.append((operator, 1, tuple(sorted({place[each] for each in operator.needs}))))
            place.append(len(made) - 1)
    return made


def curve(measured: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Alpha and beta of T(n) = alpha + beta / n by least squares of relative errors, neither below zero."""
    from scipy.optimize import nnls

    rows = [[1 / seconds, 1 / count / seconds] for count, seconds in measured]
    (alpha, beta), _ = nnls(torch.tensor(rows, dtype=torch.float64).numpy(), torch.ones(len(rows)).double().numpy())
    return float(alpha), float(beta)


def profile(width: int, rows: int, counts: Sequence[int], tries: int = 25) -> list[tuple[int, float]]:
    """Measure a feed-forward layer's training pass on the rows that each of n devices would have.

    Counts take turns, and the least of the tries is taken: whatever else the machine does only adds to it.
    """
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    batches = {count: torch.randn(rows // count, width) for count in counts}
    shortest = dict.fromkeys(counts, float("inf"))
    for _ in range(tries):
        for count, batch in batches.items():
            started = time.perf_counter()
            layer(batch).square().sum().backward()
            shortest[count] = min(shortest[count], time.perf_counter() - started)
    return list(shortest.items())


def random_tasks(chance: random.Random, devices: int = 8) -> Workload:
    """Several tasks: encoders of their modalities, each with its own scaling, then a joint module and a head."""
    operators: list[Operator] = []
    for task in range(chance.randint(2, 5)):
        ends = []
        for kind in chance.sample(["image", "text", "audio", "motion"], chance.randint(1, 3)):
            size, before = chance.choice([1, 2, 4]), tuple[int, ...]()
            for _ in range(chance.randint(4, 16)):
                operators.append(Operator(f"{kind} {task}", size, before))
                before = (len(operators) - 1,)
            ends.append(len(operators) - 1)
        size, before = chance.choice([4, 8]), tuple(ends)
        for _ in range(chance.randint(6, 24)):
            operators.append(Operator(f"joint {task}", size, before))
            before = (len(operators) - 1,)
    made = []
    for operator, layers, needs in contracted(operators):
        beta, alpha = operator.size * chance.uniform(0.5, 1.5), chance.uniform(0.02, 0.4)
        seconds = tuple((count, alpha + beta / count) for count in COUNTS if count <= devices)
        made.append(MetaOperator(operator.kind, layers, seconds, needs))
    return Workload(tuple(made), devices)


def claim(lab: Laboratory) -> Measured:
    """Near the continuous bound over many workloads, faster than task by task; scaling foretold for another count."""
    chance, plan = random.Random(0), Wavefront()
    above, truly, gains = [], [], []
    started = time.perf_counter()
    for _ in range(60):
        seen = random_tasks(chance)
        slots = plan.decide(seen)
        if fault := plan.fault(seen, slots):
            return Measured(f"a schedule is unsound: {fault}", False)
        seconds = plan.cost(seen, slots)
        above.append(seconds / level_bound(seen))
        truly.append(seconds / least(seen))
        gains.append(one_after_another(seen) / seconds)
    each = (time.perf_counter() - started) / 60
    measured = profile(192, 1024, COUNTS)
    alpha, beta = curve([point for point in measured if point[0] != 4])
    off = abs((alpha + beta / 4) / dict(measured)[4] - 1)
    return Measured(
        f"over 60 workloads {max(above):.2f} times the continuous optimum of the levels at worst, "
        f"{median(above):.2f} in the middle ({max(truly):.2f} and {median(truly):.2f} of what no "
        f"schedule can beat), {min(gains):.2f} to "
        f"{max(gains):.2f} times as fast as one after another; {each * 1e3:.0f} ms to plan; a layer's time on 4 "
        f"devices' rows foretold within {off:.1%}",
        max(above) <= 1.15 and min(gains) > 1 and off <= 0.1,
        {"worst": max(above), "median": median(above), "worst_true": max(truly), "gain": min(gains), "off": off},
    )
