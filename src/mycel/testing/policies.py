"""The laws of a scheduling policy: what every implementation must keep, whoever arrives and however short pages are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mycel.generation.engine import Engine, Limits
from mycel.generation.request import Request, Token
from mycel.generation.scheduler import Policy, Step, View
from mycel.generation.simulator import Clock, Costs, Imagined

COSTS = Costs(1e-3, 1e-4, 1e-5)
PAGE = 4


class _Watched:
    """A policy whose every step is held against the limits of its view."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def decide(self, view: View) -> Step:
        step = self.policy.decide(view)
        assert step == self.policy.decide(view), "the same view must give the same step"
        known = {job.id: job for job in view.jobs}
        run = dict(step.run)
        named = {*run, *step.aside, *step.back}
        assert len(run) == len(step.run), "a job stands in a step once"
        assert named <= known.keys(), "a step names jobs that are there"
        assert not set(run) & set(step.aside), "a job that is set aside does not run"
        assert set(step.aside) <= {job.id for job in view.jobs if job.place == "resident"}, "only residents make room"
        assert set(step.back) <= {job.id for job in view.jobs if job.place == "aside"}, "only who is aside comes back"
        assert all(known[job].place != "aside" or job in step.back for job in run), "who is aside first comes back"
        idle = {job.id for job in view.jobs if job.place == "resident" and not job.moving} - {*run, *step.aside}
        assert set(step.leave) <= idle, "only idle residents are copied out ahead"
        absent = {job.id for job in view.jobs if job.place == "aside"} - set(step.back)
        assert set(step.come) <= absent, "only who stays aside is copied back ahead"
        assert 1 <= len(run) <= view.most_jobs, "a step runs somebody, and no more than the limit"
        assert all(1 <= tokens <= known[job].left for job, tokens in run.items()), "a job runs what it has left"
        assert sum(run.values()) <= view.most_tokens, "tokens stay within the iteration's limit"
        free = view.available + sum(known[job].held for job in step.aside) - sum(known[job].held for job in step.back)
        for job, tokens in run.items():
            held = known[job].held if known[job].place != "waiting" else 0
            free -= max(0, -(-(known[job].computed + tokens) // view.page) - held)
        assert free >= 0, "a step needs no more pages than there are"
        return step


def check_policy(make: Callable[[], Policy], seeds: int = 4) -> None:
    """Raise ``AssertionError`` with the law that ``make()``'s policy breaks.

    Random requests meet a store that holds all of them, and one that holds a few; everybody must be served in the end
    and every page given back.
    """
    for seed in range(seeds):
        for pages in (12, 400):
            _serve(make(), seed, pages)


def _serve(policy: Policy, seed: int, pages: int) -> None:
    source, clock = np.random.default_rng(seed), Clock()
    limits = Limits(memory=64 * PAGE * pages, page=PAGE, tokens=16, jobs=3, share=False)
    engine = Engine(
        Imagined(COSTS, clock, 1024, 64), limits=limits, policy=_Watched(policy), clock=clock, background=False
    )
    ended: list[str | None] = []

    def listener(token: Token) -> None:
        if token.reason:
            ended.append(token.reason)

    for _ in range(30):
        prompt = tuple([3] * int(source.integers(1, 20)))
        engine.submit(Request(prompt, int(source.integers(1, 20))), listener)
        for _ in range(int(source.integers(0, 4))):
            engine.step()
    engine.run()
    assert ended == ["length"] * 30, "every request is served to its end"
    assert engine.pool.held == 0, "every page is given back"
