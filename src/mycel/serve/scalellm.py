"""ScaleLLM: look at the whole way of a request, and send it where the load calls for.

Source: Yao et al. 2024, "ScaleLLM: A Resource-Frugal LLM Serving Framework by Optimizing End-to-End Efficiency". With
many clients the gateway rather than the engine decides; `benchmarks/door.py` measures ours. Two decisions remain for
the router: *how* to serve - few wide replicas for latency, many narrow ones for throughput, switched at 64 requests
under way and, so that it does not flutter, back at 48 - and *which* replica, the one with the least work per speed.

With replicas alike and requests alike the choice is round robin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mycel.generation.engine import Engine, Limits
from mycel.generation.executor import Whole
from mycel.generation.scheduler import FirstComeFirstServed, Step, View
from mycel.generation.simulator import at_rate, heavy_tailed, replay
from mycel.rounds.laboratory import Laboratory, Measured

Layout = Literal["wide", "narrow"]


@dataclass(frozen=True)
class Blueprint:
    """Which layout serves, by requests under way; requests already begun stay where they are."""

    up: int = 64
    down: int = 48

    def decide(self, under_way: int, layout: Layout) -> Layout:
        """Return the layout for new requests."""
        if under_way >= self.up:
            return "narrow"
        return "wide" if under_way < self.down else layout


def least_loaded(work: Sequence[float], speeds: Sequence[float]) -> int:
    """Return the replica that would be free first: least work per speed."""
    return min(range(len(work)), key=lambda index: (work[index] / speeds[index], index))


class StaticBatching:
    """The baseline: a batch is taken when the last one has ended, and none joins it on the way."""

    def decide(self, view: View) -> Step:
        """Go on with the batch, or take the next."""
        begun = [job for job in view.jobs if job.place != "waiting"]
        allowed = begun or sorted(view.jobs, key=lambda job: job.id)[: view.most_jobs]
        names = frozenset(job.id for job in allowed)
        held = View(
            view.now,
            tuple(job for job in view.jobs if job.id in names),
            view.available,
            view.page,
            view.most_tokens,
            view.most_jobs,
        )
        return FirstComeFirstServed().decide(held)


def late_share(choose: Callable[[Sequence[float], int], int], speeds: Sequence[float], seed: int) -> float:
    """Return the 99th percentile of seconds to finish over unequal replicas, at load 0.7."""
    source = np.random.default_rng(seed)
    work, times = np.zeros(len(speeds)), []
    for turn in range(20_000):
        size = float(source.exponential(1.0))
        gap = float(source.exponential(1.0 / (0.7 * sum(speeds))))
        work = np.maximum(0.0, work - gap * np.asarray(speeds))
        chosen = choose(work.tolist(), turn)
        work[chosen] += size
        times.append(work[chosen] / speeds[chosen])
    return float(np.quantile(times, 0.99))


def claim(lab: Laboratory) -> Measured:
    """Continuous batching takes less time than static, live; the load-aware choice has the better 99th percentile."""
    executor = Whole(lab.open_base().model)
    limits = Limits(jobs=8, tokens=64, share=False, memory=executor.position_bytes * 16 * 600)
    trace = at_rate(heavy_tailed(48, seed=3, longest=400), 1e6)
    steps = {}
    for name, policy in (("static", StaticBatching()), ("continuous", FirstComeFirstServed())):
        engine = Engine(executor, limits=limits, policy=policy)
        replay(engine, trace)
        steps[name] = engine.counts.steps
    speeds = (1.0, 1.0, 2.0)
    aware = late_share(lambda work, turn: least_loaded(work, speeds), speeds, seed=1)
    in_turn = late_share(lambda work, turn: turn % len(speeds), speeds, seed=1)
    ratio = steps["static"] / steps["continuous"]
    return Measured(
        f"static batching takes {ratio:.1f} times the iterations of continuous; over unequal replicas the 99th "
        f"percentile is {aware:.1f} s by load and {in_turn:.1f} s in turn (simulated)",
        ratio >= 2 and aware < in_turn,
        {"static_over_continuous": ratio, "p99_load": aware, "p99_turn": in_turn},
    )
