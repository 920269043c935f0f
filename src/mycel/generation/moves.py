"""Who holds pages: requests are set aside, come back and leave, at once or ahead of time beside the computing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mycel.generation.aside import Aside
from mycel.generation.executor import Executor
from mycel.generation.memory import Memory
from mycel.generation.pages import PagePool
from mycel.generation.scheduler import Step
from mycel.generation.sequence import Sequence


@dataclass
class Moved:
    """What was moved so far: requests set aside at once, copies begun ahead, tokens that must be computed again."""

    set_aside: int = 0
    early: int = 0
    recomputed: int = 0


class Moves:
    """Moves requests' keys and values between the pages and the room aside.

    Parameters
    ----------
    executor : Executor
        Whose memory the pages are.
    pool : PagePool
        Who holds which page.
    aside : Aside
        The other room.
    moved : Moved
        Counts what is done.
    """

    def __init__(self, executor: Executor, pool: PagePool, aside: Aside, moved: Moved) -> None:
        self.executor, self.pool, self.aside, self.moved = executor, pool, aside, moved

    def take_note(self, active: Mapping[int, Sequence]) -> None:
        """Give back the pages whose copies are made, and take note of those that came in."""
        for identity in self.aside.left():
            sequence = active[identity]
            self._is_aside(sequence, self.pool.pages_for(sequence.computed))
        for identity in self.aside.arrived():
            active[identity].moving = ""

    def begin(self, step: Step, active: Mapping[int, Sequence]) -> None:
        """Begin copies for later iterations, as far as pages and room allow."""
        memory = self.executor.memory
        if not isinstance(memory, Memory):  # ranks' pages are reached over the links that the computing uses
            return
        for identity in (*step.leave, *step.come):
            sequence = active[identity]
            if sequence.place == "aside" and sequence.aside <= self.pool.available:
                sequence.table = self.pool.take(sequence.aside)
                self.aside.fetch(identity, memory, sequence.table)
                sequence.place, sequence.moving, sequence.aside = "resident", "in", 0
                self.moved.early += 1
            elif sequence.place == "resident" and not sequence.moving:
                needed = self.pool.pages_for(sequence.computed)
                if self.aside.begin(identity, memory, sequence.table[:needed]):
                    sequence.moving = "out"
                    self.moved.early += 1

    def stand_still(self, sequence: Sequence) -> None:
        """Have a sequence's pages complete and its own, whatever was being copied."""
        if sequence.moving == "out":
            self.aside.stay(sequence.id)
        elif sequence.moving == "in":
            self.aside.arrive(sequence.id)
        sequence.moving = ""

    def set_aside(self, sequence: Sequence) -> None:
        """Give a sequence's pages to others now."""
        self.moved.set_aside += 1
        if sequence.moving == "in":
            self.stand_still(sequence)
        needed, memory = self.pool.pages_for(sequence.computed), self.executor.memory
        if memory is not None and self.aside.put(sequence.id, memory, sequence.table[:needed]):
            self._is_aside(sequence, needed)
        else:
            self.moved.recomputed += sequence.computed
            self.release(sequence)

    def bring_back(self, sequence: Sequence) -> None:
        """Give a sequence pages again, and what it had in them."""
        assert self.executor.memory is not None
        sequence.table = self.pool.take(sequence.aside)
        self.aside.take(sequence.id, self.executor.memory, sequence.table)
        sequence.place, sequence.aside = "resident", 0

    def release(self, sequence: Sequence) -> None:
        """Let a sequence hold nothing: it begins anew, or has ended."""
        try:
            self.aside.drop(sequence.id)
            self.executor.forget(sequence.id)
        finally:
            self.pool.release(sequence.table)
            sequence.table, sequence.computed, sequence.published = [], 0, 0
            sequence.place, sequence.moving = "waiting", ""

    def _is_aside(self, sequence: Sequence, needed: int) -> None:
        self.pool.release(sequence.table)
        sequence.place, sequence.moving, sequence.aside, sequence.table = "aside", "", needed, []
