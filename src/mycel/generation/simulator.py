"""The engine on a virtual clock: the same loop, store and policy, over an executor that only takes time.

What an iteration takes is fitted to the live engine, so that a policy can be tried on a trace in a moment and the
prediction held against a live run of the same trace.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mycel.generation.engine import Engine
from mycel.generation.executor import Piece
from mycel.generation.memory import Memory, Shape
from mycel.generation.request import Request, Token


@dataclass(frozen=True)
class Costs:
    """Seconds of an iteration: for itself, for each request in it, and for each further token of a prompt."""

    step: float
    row: float
    token: float

    def seconds(self, rows: int, tokens: int) -> float:
        """Return what an iteration over ``rows`` requests with ``tokens`` tokens in all takes."""
        return self.step + self.row * rows + self.token * (tokens - rows)

    def at_pace(self, pace: float) -> Costs:
        """Return the costs on a machine that takes ``pace`` times as long."""
        return Costs(pace * self.step, pace * self.row, pace * self.token)

    def pace_of(self, steps: Sequence[tuple[float, int, int]]) -> float:
        """Return how long watched iterations took, as a share of what these costs foretell for them."""
        return sum(step[0] for step in steps) / sum(self.seconds(rows, tokens) for _, rows, tokens in steps)


@dataclass
class Clock:
    """Virtual seconds."""

    now: float = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


class Imagined:
    """An executor that computes nothing and takes the time that the real one would.

    Parameters
    ----------
    costs : Costs
        Of the real one.
    clock : Clock
        Moved by every iteration.
    context, position_bytes : int
        As of the real one.
    """

    vocabulary = 8
    memory: Memory | None

    def __init__(self, costs: Costs, clock: Clock, context: int, position_bytes: int) -> None:
        self.costs, self.clock, self.context, self.position_bytes = costs, clock, context, position_bytes
        self.memory = None

    def reserve(self, pages: int, size: int) -> None:
        """Make room for almost nothing."""
        self.memory = Memory([Shape(1, 1, 1)], pages, size)

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Take time, and favour a token that ends nothing."""
        self.clock.wait(self.costs.seconds(len(pieces), sum(len(piece.tokens) for piece in pieces)))
        logits = torch.zeros(sum(piece.wanted for piece in pieces), self.vocabulary)
        logits[:, 3] = 1.0
        return logits

    def forget(self, sequence: int) -> None:
        """Keep nothing."""

    def close(self) -> None:
        """Keep nothing."""


@dataclass(frozen=True)
class Arrival:
    """One request of a trace: when, tokens of its prompt, tokens it will generate."""

    at: float
    prompt: int
    most: int


@dataclass
class Outcome:
    """What became of a request, in seconds from its arrival."""

    first: float = 0.0
    done: float = 0.0


def heavy_tailed(
    count: int, seed: int, short: int = 4, longest: int = 900, shape: float = 0.9, prompts: tuple[int, int] = (4, 48)
) -> list[Arrival]:
    """Return requests with Pareto lengths, one after another at unit rate; ``at_rate`` spreads them."""
    source = np.random.default_rng(seed)
    gaps = source.exponential(1.0, count)
    lengths = np.minimum(short * (1 + source.pareto(shape, count)), longest).astype(int)
    sizes = source.integers(prompts[0], prompts[1], count)
    return [
        Arrival(float(at), int(prompt), int(most))
        for at, prompt, most in zip(np.cumsum(gaps), sizes, lengths, strict=True)
    ]


def at_rate(trace: Sequence[Arrival], rate: float) -> list[Arrival]:
    """Return the trace with ``rate`` requests a second."""
    return [Arrival(arrival.at / rate, arrival.prompt, arrival.most) for arrival in trace]


def load_of(trace: Sequence[Arrival], costs: Costs, jobs: int) -> float:
    """Return which share of the engine's capacity, ``jobs`` requests at a time, a trace asks for."""
    share = costs.seconds(jobs, jobs) / jobs
    work = sum(arrival.most * share + (arrival.prompt - 1) * costs.token for arrival in trace)
    return work / trace[-1].at


def replay(
    engine: Engine, trace: Sequence[Arrival], wait: Callable[[float], None] = time.sleep, watch: bool = False
) -> tuple[list[Outcome], list[tuple[float, int, int]]]:
    """Send a trace to an engine, live or imagined, by the engine's own clock.

    Returns
    -------
    tuple
        What became of each request; and, with ``watch``, of each iteration its seconds, requests and tokens.
    """
    outcomes = [Outcome() for _ in trace]
    steps: list[tuple[float, int, int]] = []
    began, sent = engine.clock(), 0
    while sent < len(trace) or engine.waiting:
        while sent < len(trace) and trace[sent].at <= engine.clock() - began:
            _send(engine, trace[sent], outcomes[sent], began, sent)
            sent += 1
        before, counted = engine.clock(), engine.counts.computed
        running = engine.waiting
        if not engine.step():
            wait(max(0.0, trace[sent].at - (engine.clock() - began)))
        elif watch:
            steps.append((engine.clock() - before, min(running, engine.limits.jobs), engine.counts.computed - counted))
    return outcomes, steps


def fit(steps: Sequence[tuple[float, int, int]]) -> Costs:
    """Fit the costs to watched iterations.

    The slowest hundredth, when others had the machine, does not bend the proportions; its time was spent all the same,
    so that the costs foretell the sum of all that was watched.
    """
    seconds = np.array([step[0] for step in steps])
    kept = seconds <= np.quantile(seconds, 0.99)
    design = np.array([[1.0, rows, max(0, tokens - rows)] for _, rows, tokens in steps])
    found, *_ = np.linalg.lstsq(design[kept], seconds[kept], rcond=None)
    found = np.maximum(found, 0.0)
    return Costs(*(found * (seconds.sum() / (design @ found).sum())).tolist())


def _send(engine: Engine, arrival: Arrival, outcome: Outcome, began: float, seed: int) -> None:
    due = began + arrival.at

    def listener(token: Token) -> None:
        now = engine.clock() - due
        outcome.first = outcome.first or now
        outcome.done = now

    vocabulary = engine.executor.vocabulary
    prompt = tuple(3 + (seed * 31 + index * 7) % (vocabulary - 3) for index in range(arrival.prompt))
    engine.submit(Request(prompt, arrival.most), listener)
