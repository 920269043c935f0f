"""When nodes are asked and when their answers combine: two pure functions over what is out and what has arrived."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from mycel.errors import RecipeError


@dataclass(frozen=True)
class View:
    """What a pace may look at.

    Attributes
    ----------
    version : int
        Rounds combined so far.
    cohort : tuple of int
        Nodes sampled for this version, in the order they may be asked.
    outstanding : tuple of int
        Nodes that were asked and have not answered, whatever the version.
    arrived : tuple of int
        Nodes whose sound answers wait to be combined.
    refused : tuple of int
        Nodes of this version whose answers were unsound or that failed.
    overdue : bool
        Whether the learnt deadline has passed.
    """

    version: int
    cohort: tuple[int, ...]
    outstanding: tuple[int, ...] = ()
    arrived: tuple[int, ...] = ()
    refused: tuple[int, ...] = ()
    overdue: bool = False


class Pace(ABC):
    """Decides whom to ask now and whether to combine now.

    Attributes
    ----------
    name : str
        As written in a recipe, without its argument.
    keeps : bool
        Whether nodes still out when answers combine go on working; otherwise their leases end.
    """

    name: str
    keeps: bool = False

    @abstractmethod
    def ask(self, view: View) -> Sequence[int]:
        """Return the nodes to ask now."""

    @abstractmethod
    def ready(self, view: View) -> bool:
        """Return whether to combine what has arrived."""


@dataclass(frozen=True)
class Synchronous(Pace):
    """Ask the cohort together; combine when all have answered, or a quorum once the deadline has passed."""

    quorum: float = 1.0
    name = "synchronous"

    def ask(self, view: View) -> Sequence[int]:
        """Ask whoever of the cohort has not been asked in this version."""
        busy = {*view.outstanding, *view.arrived, *view.refused}
        return [node for node in view.cohort if node not in busy]

    def ready(self, view: View) -> bool:
        """All who can answer have, or enough have and the deadline is past."""
        expected = len(view.cohort) - len(view.refused)
        if not view.arrived:
            return False
        if len(view.arrived) >= expected:
            return True
        # 0.55 * 100 is a little more than 55, which must not ask for a 56th answer.
        return view.overdue and len(view.arrived) >= math.ceil(self.quorum * len(view.cohort) - 1e-9)


@dataclass(frozen=True)
class Buffered(Pace):
    """Keep every node of the cohort at work; combine whenever ``size`` answers have arrived."""

    size: int
    name = "buffered"
    keeps = True

    def ask(self, view: View) -> Sequence[int]:
        """Ask whoever is idle."""
        busy = {*view.outstanding, *view.arrived, *view.refused}
        return [node for node in view.cohort if node not in busy]

    def ready(self, view: View) -> bool:
        """Enough answers wait, or all that can come have."""
        return bool(view.arrived) and (len(view.arrived) >= self.size or not view.outstanding)


@dataclass(frozen=True)
class Sequential(Pace):
    """Visit the nodes one after another; each one's answer is combined before the next is asked."""

    name = "sequential"

    def ask(self, view: View) -> Sequence[int]:
        """Ask the next node of the cycle that has not just failed."""
        if view.outstanding or view.arrived:
            return []
        turn = view.version % len(view.cohort)
        order = (*view.cohort[turn:], *view.cohort[:turn])
        return [node for node in order if node not in view.refused][:1]

    def ready(self, view: View) -> bool:
        """One answer is enough."""
        return bool(view.arrived)


def parse_pace(text: str, quorum: float = 1.0) -> Pace:
    """Return the pace that a recipe's ``rounds.pace`` names."""
    if text == "synchronous":
        return Synchronous(quorum)
    if text == "sequential":
        return Sequential()
    match = re.fullmatch(r"buffered\((\d+)\)", text)
    if match and int(match[1]) > 0:
        return Buffered(int(match[1]))
    raise RecipeError(
        f"rounds.pace is {text!r}; it is 'synchronous', 'sequential' or 'buffered(K)' with K of 1 or more"
    )
