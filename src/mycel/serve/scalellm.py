"""ScaleLLM: look at the whole way of a request, and send it where the load calls for.

Source: Yao et al. 2024, "ScaleLLM: A Resource-Frugal LLM Serving Framework by Optimizing End-to-End Efficiency". With
many clients the gateway rather than the engine decides, so a request's way is broken down into spans from door to
engine (`mycel_span_seconds` at `/metrics`, and in the journal), and the gateway is lean: ours checks once, in the
engine's own process; ``gateway.py`` is the usual kind, `benchmarks/door.py --part gateways` sets them side by side.
Two decisions remain for the router: *how* to serve - few wide replicas for latency, many narrow ones for throughput,
switched at 64 requests under way and, so that it does not flutter, back at 48 - and *which* replica, the one with the
least work per speed.

With replicas alike and requests alike the choice is round robin. The paper's gateway is written in Rust and speaks
gRPC to its engines; here the lean way is not to have a second process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import httpx
import numpy as np

from mycel.generation.engine import Engine, Limits
from mycel.generation.executor import Whole
from mycel.generation.scheduler import FirstComeFirstServed, Step, View
from mycel.generation.simulator import at_rate, heavy_tailed, replay
from mycel.models.base import find_base
from mycel.rounds.laboratory import Laboratory, Measured
from mycel.serve.gateway import process, visit

TOKENS, CLIENTS = 16, 64
GATEWAY = "mycel.serve.gateway"
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
    found = gateways(lab)
    lean, usual = found["door"], found["gateway"]
    more = (usual.alone - lean.alone) / max(lean.added, 1e-6)
    spread = ", ".join(f"{name} {share:.0%}" for name, share in lean.spans.items() if share >= 0.005)
    return Measured(
        f"of an answer of {TOKENS} tokens to one client: {spread}, which leaves {lean.unexplained:.0%} of what the"
        f" client waits to the network; the door's own part is {lean.added * 1e3:.2f} ms,"
        f" the usual gateway adds {(usual.alone - lean.alone) * 1e3:.2f} ms to it; with {CLIENTS} clients"
        f" {lean.rate:.0f} and {usual.rate:.0f} requests a second; static batching takes {ratio:.1f} times the"
        f" iterations of continuous; over unequal replicas the 99th percentile is {aware:.1f} s by load and"
        f" {in_turn:.1f} s in turn (simulated)",
        ratio >= 2 and aware < in_turn and lean.rate >= 1.5 * usual.rate,
        {
            "static_over_continuous": ratio,
            "p99_load": aware,
            "p99_turn": in_turn,
            "door_ms": lean.added * 1e3,
            "gateway_over_door": more,
            "rate_over_gateway": lean.rate / usual.rate,
            "unexplained": lean.unexplained,
        },
    )


@dataclass(frozen=True)
class Way:
    """What a way to the engine costs.

    Attributes
    ----------
    alone : float
        Median seconds of an answer to one client.
    rate : float
        Answers a second to many clients.
    spans : dict of str to float
        Share of each part of the way, one client.
    added : float
        Seconds of the door's own parts, a request.
    unexplained : float
        Share of the client's seconds that no span accounts for: sockets, and HTTP's heads.
    """

    alone: float
    rate: float
    spans: dict[str, float]
    added: float
    unexplained: float


OWN = ("parse", "tokenise", "enter", "detokenise", "send")


def gateways(lab: Laboratory) -> dict[str, Way]:
    """Measure the door of a small model, and the same door behind a gateway of the usual kind."""
    place = str(find_base("micro"))
    found = {}
    with process("-m", "mycel", "serve", place, "--port", "0") as door, process("-m", GATEWAY, door) as gateway:

        def body(turn: int) -> dict[str, object]:
            asked = {"model": Path(place).name, "prompt": "def add(a, b):", "max_tokens": TOKENS, "stream": True}
            return {**asked, "ignore_eos": True, "temperature": 0}

        for name, address in (("door", door), ("gateway", gateway)):
            asyncio.run(visit(address, body, 8, 4))
            before = _spans(door)
            alone = asyncio.run(visit(address, body, 1, 60))
            spans = {span: seconds - before.get(span, 0.0) for span, seconds in _spans(door).items()}
            many = asyncio.run(visit(address, body, CLIENTS, 4))
            total, waited = sum(spans.values()), sum(alone.seconds)
            found[name] = Way(
                median(alone.seconds),
                len(many.seconds) / many.took,
                {span: seconds / total for span, seconds in spans.items()},
                sum(spans.get(span, 0.0) for span in OWN) / len(alone.seconds),
                max(0.0, 1 - total / waited),
            )
    return found


def _spans(address: str) -> dict[str, float]:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    sums = [line for line in lines if line.startswith("mycel_span_seconds_sum")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in sums}
