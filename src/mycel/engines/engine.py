"""The contract of every engine: ask a node, wait for whichever answer comes next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mycel.wire.shelf import Frame


@dataclass(frozen=True)
class Request:
    """One question to one node.

    Attributes
    ----------
    generation : int
        Number of the lease; an answer that carries an older one is late.
    frame : bytes or Kept
        The serialised brief, or where it waits.
    asked : float
        When it was sent, in the engine's seconds.
    seconds : float
        Predicted compute seconds; simulated engines take exactly this long, real ones ignore it.
    ready : float, optional
        For a node that works ahead of its briefs: when the answer that it made after the one before is done. It leaves
        then, and the ``seconds`` of this brief's work pass while it travels. None: the answer is made from this brief.
    """

    node: int
    generation: int
    frame: Frame
    asked: float
    seconds: float
    ready: float | None = None


@dataclass(frozen=True)
class Arrival:
    """One answer as it reaches the coordinator.

    Attributes
    ----------
    frame : bytes or Kept
        The serialised answer, or where it waits; empty when the node refused.
    refusal : str
        Why the node refused; empty when it answered.
    started, computed, at : float
        When the brief had arrived, the work was done, and the answer arrived, in the engine's seconds.
    left : bool
        Whether there is no answer because the node has gone or what it sent was lost, for the reason in ``refusal``.
    """

    node: int
    generation: int
    frame: Frame
    refusal: str
    asked: float
    started: float
    computed: float
    at: float
    left: bool = False


@dataclass(frozen=True)
class Pending:
    """A request whose answer is still to come, and what its party had at home when it was asked."""

    request: Request
    home: bytes


class Engine(Protocol):
    """Carries requests and answers; the same coordinator drives every implementation."""

    def now(self) -> float:
        """Seconds on the engine's clock."""

    def expected_seconds(self, request: Request) -> float | None:
        """Predicted seconds from question to answer; None where only experience can tell."""

    def ask(self, request: Request, home: bytes | None = None) -> None:
        """Send a request; returns at once.

        ``home`` is what the party had at home when the request was first sent, for a resumed run; by default what it
        has now. Engines that do not simulate parties ignore it.
        """

    async def answer(self, until: float | None) -> Arrival | None:
        """Return the next answer, or None once the clock has reached ``until``."""

    def homes(self) -> Mapping[int, bytes]:
        """Return what parties keep at home, where this engine simulates them; else nothing."""

    def pending(self) -> Sequence[Pending]:
        """Return what a resumed run must ask again, leases or no, where this engine simulates parties; else nothing."""

    async def close(self) -> None:
        """Give up whatever is still out."""
