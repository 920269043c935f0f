"""FastServe: short jobs need not wait for long ones, although nobody knows which are short.

Source: Wu et al. 2023, "Fast Distributed Inference Serving for Large Language Models" (NSDI 2026). Jobs stand in
queues Q1 to Qn with quanta ``q_i = q_1 * 2**(i-1)``. A job's prompt tells the time of its first iteration, so it joins
the first queue whose quantum covers that (*skip-join*) and short prompts are not held up by it. A job that used up its
quantum sinks by one queue; one that has not run for ``alpha`` seconds rises to the first. Every iteration runs the
jobs of the highest queues, first in, first out.

When pages are short, the job that is *expected to run last* makes room: ``ENST(i) = min(T_promote(i), T_execute(i))``
with ``T_promote = alpha - waited`` and ``T_execute`` the quanta that jobs of higher queues will use before they sink to
job i's, divided by the batch. *Proactive*: before pages run out, such jobs' pages are copied out beside the computing,
until a share ``spare`` of all pages is free or coming free; and a job aside that is among the next to run comes back
beside the computing while pages beyond that share are free.

Reduces to first come, first served with one queue of infinite quantum, to naive feedback queues with
``skip_join = False``, and to copying only when pages have run out with ``spare = 0``. Not built: several machines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from mycel.generation.engine import Engine, Limits
from mycel.generation.executor import Whole
from mycel.generation.scheduler import FirstComeFirstServed, Job, Policy, Step, View, fill
from mycel.generation.simulator import (
    Arrival,
    Clock,
    Costs,
    Imagined,
    Outcome,
    at_rate,
    fit,
    heavy_tailed,
    load_of,
    replay,
)
from mycel.rounds.laboratory import Laboratory, Measured

LEVELS = 12


@dataclass(frozen=True)
class Standing:
    """Where a job stands: queue, when it came into it, seconds used there, when it last ran."""

    level: int
    entered: float
    used: float
    ran: float


@dataclass(frozen=True)
class Notes:
    """What the policy remembers: the last decision's moment, who ran then, and where everybody stands."""

    now: float
    running: frozenset[int]
    standing: tuple[tuple[int, Standing], ...]


class FastServe:
    """The policy.

    Parameters
    ----------
    costs : Costs
        Of an iteration, from which a prompt's first iteration is foretold.
    quantum : float
        Seconds of the first queue; 0 takes the shortest iteration.
    alpha : float
        Seconds without running after which a job rises to the first queue.
    skip_join : bool
        Whether a job joins the queue that fits its prompt; otherwise the first.
    spare : float
        Share of the pages that is kept free by copying ahead of need; 0: pages are copied when they have run out.
    """

    def __init__(
        self,
        costs: Costs,
        quantum: float = 0.0,
        alpha: float = 0.3,
        skip_join: bool = True,
        spare: float = 0.1,
    ) -> None:
        self.costs, self.alpha, self.skip_join, self.spare = costs, alpha, skip_join, spare
        self.quantum = quantum or costs.seconds(1, 1)

    def decide(self, view: View) -> Step:
        """Run the highest queues; make room by expected next time."""
        standing = self.standings(view)
        order = sorted(view.jobs, key=lambda job: (standing[job.id].level, standing[job.id].entered, job.id))
        waits: dict[int, float] = {}
        if len(order) > view.most_jobs:
            # Whoever is not about to run makes room by expected time; among those about to run, the last.
            waits = self.next_times(view, order, standing)
            order[view.most_jobs :] = sorted(order[view.most_jobs :], key=lambda job: (waits[job.id], job.id))
        step = fill(view, order)
        leave, come = self.ahead(view, step, order) if waits and self.spare else ((), ())
        notes = Notes(view.now, frozenset(job for job, _ in step.run), tuple(standing.items()))
        return Step(step.run, step.aside, step.back, notes, leave, come)

    def ahead(self, view: View, step: Step, order: Sequence[Job]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return whose pages are copied out, and whose back in, beside the computing of ``step``."""
        run, named = dict(step.run), {*step.aside, *step.back}
        held = {job.id: job.held for job in view.jobs if job.place == "resident"}
        free, pages, leaving = view.available, view.available + sum(held.values()), 0
        for job in order:
            free += job.held * ((job.id in step.aside) - (job.id in step.back))
            if job.id in run:
                has = 0 if job.place == "waiting" else job.held
                free -= max(0, -(-(job.computed + run[job.id]) // view.page) - has)
            elif job.moving == "out" and job.id not in named:
                leaving += job.held
        wanted = int(self.spare * pages)
        leave, come = list[int](), list[int]()
        for job in reversed(order):  # expected to run last
            if free + leaving >= wanted:
                break
            if job.place == "resident" and not job.moving and job.id not in run and job.id not in named:
                leave.append(job.id)
                leaving += job.held
        for job in order[: 2 * view.most_jobs]:
            if job.place == "aside" and job.id not in named and free - job.held >= 2 * wanted:  # not to go to and fro
                come.append(job.id)
                free -= job.held
        return tuple(leave), tuple(come)

    def standings(self, view: View) -> dict[int, Standing]:
        """Bring every job's standing up to now."""
        notes = view.memory if isinstance(view.memory, Notes) else Notes(view.now, frozenset(), ())
        before, passed = dict(notes.standing), view.now - notes.now
        standing: dict[int, Standing] = {}
        for job in view.jobs:
            at = before.get(job.id)
            if at is None:
                level = self.first_level(job.prompt) if self.skip_join else 0
                standing[job.id] = Standing(level, view.now, 0.0, view.now)
                continue
            if job.id in notes.running:
                at = Standing(at.level, at.entered, at.used + passed, view.now)
                if at.used > self.quantum_of(at.level) and at.level < LEVELS - 1:
                    at = Standing(at.level + 1, view.now, 0.0, view.now)
            elif at.level > 0 and view.now - at.ran >= self.alpha:
                at = Standing(0, view.now, 0.0, view.now)
            standing[job.id] = at
        return standing

    def first_level(self, prompt: int) -> int:
        """Return the first queue whose quantum covers a prompt's first iteration."""
        needed = self.costs.seconds(1, prompt)
        return next((level for level in range(LEVELS) if self.quantum_of(level) >= needed), LEVELS - 1)

    def quantum_of(self, level: int) -> float:
        """Return a queue's quantum in seconds."""
        return self.quantum * 2.0**level

    def next_times(self, view: View, order: Sequence[Job], standing: dict[int, Standing]) -> dict[int, float]:
        """Return in how many seconds each job is expected to run next."""
        # By queue, not by pair of jobs: this runs between any two iterations.
        counts = Counter(standing[job.id].level for job in order)
        sunk = [sum(self.quantum_of(below) for below in range(level)) for level in range(LEVELS)]
        ahead = [sum(counts[above] * (sunk[level] - sunk[above]) for above in range(level)) for level in range(LEVELS)]
        return {
            job.id: min(
                max(0.0, self.alpha - (view.now - standing[job.id].ran)),
                ahead[standing[job.id].level] / view.most_jobs,
            )
            for job in order
        }


def profile(executor: Whole, limits: Limits, trace: Sequence[Arrival], make: Callable[[Costs], Policy]) -> Costs:
    """Fit the costs of an iteration, deciding included, to short live runs: all at once, then where few wait."""
    costs = fit(replay(Engine(executor, limits=limits), at_rate(trace[:20], 1e6), watch=True)[1])
    for load in (0.5, 0.8):
        spread = at_rate(trace, load / load_of(trace, costs, limits.jobs))
        costs = fit(replay(Engine(executor, limits=limits, policy=make(costs)), spread, watch=True)[1])
    return costs


def imagined(costs: Costs, executor: Whole, limits: Limits, policy: Policy, trace: Sequence[Arrival]) -> list[Outcome]:
    """Predict what becomes of a trace."""
    clock = Clock()
    engine = Engine(
        Imagined(costs, clock, executor.context, executor.position_bytes),
        limits=limits,
        policy=policy,
        clock=clock,
        background=False,
    )
    return replay(engine, trace, clock.wait)[0]


def mean_completion(outcomes: Sequence[Outcome]) -> float:
    """Return the mean seconds from arrival to the last token."""
    return fmean(outcome.done for outcome in outcomes)


def measure(executor: Whole, seed: int) -> dict[str, float]:
    """Return mean completion times of one trace at load 0.9, in seconds: live and foretold, of both policies.

    A machine's pace changes from minute to minute, and at this load the mean by a power of it. So each run is foretold
    twice: at the pace of the short runs before, and at its own, which leaves to the simulator what is the simulator's.
    """
    limits = Limits(jobs=2, tokens=64, share=False, memory=executor.position_bytes * 16 * 400)
    makers: dict[str, Callable[[Costs], Policy]] = {
        "fcfs": lambda costs: FirstComeFirstServed(),
        "fastserve": FastServe,
    }
    known = {name: profile(executor, limits, heavy_tailed(100, seed=5), make) for name, make in makers.items()}
    trace = heavy_tailed(500, seed=seed)
    trace = at_rate(trace, 0.9 / load_of(trace, known["fcfs"], limits.jobs))
    found: dict[str, float] = {}
    for name, make in makers.items():
        policy, costs = make(known[name]), known[name]
        engine = Engine(executor, limits=limits, policy=policy)
        outcomes, steps = replay(engine, trace, watch=True)
        live, pace = mean_completion(outcomes), costs.pace_of(steps)
        before = mean_completion(imagined(costs, executor, limits, policy, trace))
        told = mean_completion(imagined(costs.at_pace(pace), executor, limits, policy, trace))
        found |= {f"live_{name}": live, f"foretold_{name}": told, f"foretold_before_{name}": before}
        found |= {f"pace_{name}": pace, f"early_{name}": float(engine.counts.early)}
    costs = known["fastserve"].at_pace(found["pace_fastserve"])
    found["naive"] = mean_completion(imagined(costs, executor, limits, FastServe(costs, skip_join=False), trace))
    found["ratio"] = found["live_fastserve"] / found["live_fcfs"]
    found["error"] = found["foretold_fastserve"] / found["live_fastserve"] - 1
    found["error_before"] = found["foretold_before_fastserve"] / found["live_fastserve"] - 1
    return found


def claim(lab: Laboratory) -> Measured:
    """At load 0.9 with heavy-tailed lengths, live, jobs are done in at most half the time of first come, first served.

    The simulator, told how fast the machine was meanwhile, must come within 15 per cent of the live mean.
    """
    found = measure(Whole(lab.open_base().model), seed=2)
    return Measured(
        f"mean completion {found['live_fastserve'] * 1e3:.0f} ms live against {found['live_fcfs'] * 1e3:.0f} first "
        f"come, first served ({found['ratio']:.2f}); the simulator, told the machine's pace, says "
        f"{found['foretold_fastserve'] * 1e3:.0f} ({found['error']:+.0%}) and {found['foretold_fcfs'] * 1e3:.0f}; "
        f"with the pace of minutes before {found['error_before']:+.0%}; without skipping {found['naive'] * 1e3:.0f}",
        found["ratio"] <= 0.5 and abs(found["error"]) <= 0.15,
        found,
    )
