"""The contract of every engine: ask a node, wait for whichever answer comes next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Request:
    """One question to one node.

    Attributes
    ----------
    generation : int
        Number of the lease; an answer that carries an older one is late.
    frame : bytes
        The serialised brief.
    asked : float
        When it was sent, in the engine's seconds.
    seconds : float
        Predicted compute seconds; simulated engines take exactly this long, real ones ignore it.
    """

    node: int
    generation: int
    frame: bytes
    asked: float
    seconds: float


@dataclass(frozen=True)
class Arrival:
    """One answer as it reaches the coordinator.

    Attributes
    ----------
    frame : bytes
        The serialised answer; empty when the node refused.
    refusal : str
        Why the node refused; empty when it answered.
    started, computed, at : float
        When the brief had arrived, the work was done, and the answer arrived, in the engine's seconds.
    """

    node: int
    generation: int
    frame: bytes
    refusal: str
    asked: float
    started: float
    computed: float
    at: float


class Engine(Protocol):
    """Carries requests and answers; the same coordinator drives every implementation."""

    def now(self) -> float:
        """Seconds on the engine's clock."""

    def expected_seconds(self, request: Request) -> float | None:
        """Predicted seconds from question to answer; None where only experience can tell."""

    def ask(self, request: Request) -> None:
        """Send a request; returns at once."""

    async def answer(self, until: float | None) -> Arrival | None:
        """Return the next answer, or None once the clock has reached ``until``."""

    def homes(self) -> Mapping[int, bytes]:
        """Return what parties keep at home, where this engine simulates them; else nothing."""

    async def close(self) -> None:
        """Give up whatever is still out."""
