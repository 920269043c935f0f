"""Who runs in the next iteration: a decision, pure, the same object in the simulator and in the live engine.

After every iteration the policy sees all requests and the free pages, and says how many tokens of which requests are
computed next, which are set aside and which come back. Prompts are computed in chunks beside the decoding of others
(Yu et al. 2022, "Orca"; Agrawal et al. 2023, "SARATHI").
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Place = Literal["waiting", "resident", "aside"]
Moving = Literal["", "out", "in"]


@dataclass(frozen=True)
class Job:
    """What a policy may know of a request; how much it will generate is not known.

    Attributes
    ----------
    id : int
        Identity, ascending by arrival.
    arrived : float
        Seconds.
    prompt : int
        Tokens of the prompt.
    length : int
        Tokens known now: the prompt and what was generated.
    computed : int
        Tokens whose keys and values are stored.
    held : int
        Pages held; for a job aside, the pages that it needs to come back.
    place : str
        Not begun, in memory, or set aside.
    moving : str
        Of a job in memory: whether it is being copied out ahead, or back in.
    """

    id: int
    arrived: float
    prompt: int
    length: int
    computed: int = 0
    held: int = 0
    place: Place = "waiting"
    moving: Moving = ""

    @property
    def left(self) -> int:
        """Tokens to be computed before the next token can be drawn, at least 1."""
        return self.length - self.computed


@dataclass(frozen=True)
class View:
    """What a policy sees.

    Attributes
    ----------
    now : float
        Seconds.
    jobs : tuple of Job
        By identity.
    available : int
        Free pages.
    page : int
        Positions in a page.
    most_tokens, most_jobs : int
        Limits of one iteration.
    memory : Hashable
        What the policy said last time that it wants to remember; None at first.
    """

    now: float
    jobs: tuple[Job, ...]
    available: int
    page: int
    most_tokens: int
    most_jobs: int
    memory: Hashable = None


@dataclass(frozen=True)
class Step:
    """What happens next: set aside, then bring back, then compute ``run`` as (identity, tokens).

    Attributes
    ----------
    run, aside, back : tuple
        Of this iteration.
    memory : Hashable
        To be remembered by the policy.
    leave, come : tuple of int
        Copied beside the computing, for later iterations: residents that are not run now, whose pages come free when
        the copy is made; and jobs aside, which are residents from now on. A wish that pages do not allow is passed
        over.
    """

    run: tuple[tuple[int, int], ...] = ()
    aside: tuple[int, ...] = ()
    back: tuple[int, ...] = ()
    memory: Hashable = None
    leave: tuple[int, ...] = ()
    come: tuple[int, ...] = ()


class Policy(Protocol):
    """Chooses the next iteration."""

    def decide(self, view: View) -> Step:
        """Return the next iteration; the same view gives the same step."""


class FirstComeFirstServed:
    """Requests in the order of arrival; when pages run out, the latest arrival makes room."""

    def decide(self, view: View) -> Step:
        """Serve by arrival."""
        return fill(view, sorted(view.jobs, key=lambda job: (job.arrived, job.id)))


@dataclass
class _Plan:
    view: View
    free: int
    held: dict[int, int]
    run: dict[int, int] = field(default_factory=dict)
    aside: list[int] = field(default_factory=list)
    back: list[int] = field(default_factory=list)

    def growth(self, job: Job, tokens: int) -> int:
        needed = -(-(job.computed + tokens) // self.view.page)
        return max(0, needed - self.held.get(job.id, 0))

    def grow(self, job: Job, tokens: int) -> None:
        pages = self.growth(job, tokens)
        self.free -= pages
        self.held[job.id] = self.held.get(job.id, 0) + pages
        self.run[job.id] = tokens


def fill(view: View, order: Sequence[Job], memory: Hashable = None, keep: Iterable[int] = ()) -> Step:
    """Fill an iteration with jobs in an order of priority.

    Parameters
    ----------
    view : View
        What there is.
    order : sequence of Job
        Highest priority first. When pages are short, jobs from the end of the order make room.
    memory : Hashable
        To be remembered by the policy.
    keep : iterable of int
        Jobs that are not set aside.
    """
    plan = _Plan(view, view.available, {job.id: job.held for job in view.jobs if job.place == "resident"})
    kept = set(keep)
    victims = [job for job in order if job.place == "resident" and job.id not in kept]
    budget = view.most_tokens
    for job in order:
        if len(plan.run) == view.most_jobs or budget == 0:
            break
        if job.id in plan.aside or not _admit(plan, job, victims):
            break
        plan.grow(job, 1)
        budget -= 1
    # Every chosen request has its one token; what is left of the budget goes to prompts, in the same order.
    for job in order:
        if job.id in plan.run and job.left > 1:
            free_positions = plan.held[job.id] * view.page - job.computed + plan.free * view.page
            tokens = min(job.left, 1 + budget, free_positions)
            budget -= tokens - 1
            plan.grow(job, tokens)
    return Step(tuple(plan.run.items()), tuple(plan.aside), tuple(plan.back), memory)


def _admit(plan: _Plan, job: Job, victims: list[Job]) -> bool:
    """Make room for one more token of ``job`` and, if it is aside, for what it held; False: there is none."""
    returning = job.held if job.place == "aside" else 0
    held = plan.held.get(job.id, 0) + returning
    needed = returning + max(0, -(-(job.computed + 1) // plan.view.page) - held)
    while plan.free < needed:
        if not victims or victims[-1].id == job.id or victims[-1].id in plan.run:
            return False
        victim = victims.pop()
        plan.free += plan.held.pop(victim.id)
        plan.aside.append(victim.id)
    if returning:
        plan.free -= returning
        plan.held[job.id] = returning
        plan.back.append(job.id)
    return True
