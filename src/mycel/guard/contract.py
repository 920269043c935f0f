"""The contract of a guard that hides answers: a coordinator's half and a party's half, with messages of their own.

Messages around a round are ordinary requests whose kind begins with ``guard.``: the same engine carries them, the
meter counts them, the log shows them. A party's half is stateless between messages; what it must remember it returns
as tensors, which stay at the party.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mycel.errors import ParcelError
from mycel.wire.parcel import Parcel, Tensors

KIND = "guard."
Shapes = Mapping[str, tuple[int, ...]]
Post = Callable[[Mapping[int, Parcel]], Awaitable[dict[int, Parcel]]]
"""Sends a message to each of some nodes and returns the answers of those that answered in time."""


@dataclass(frozen=True)
class Sealed:
    """One party's hidden answer; ``weight`` is what it counts for, in whole numbers."""

    node: int
    parcel: Parcel
    weight: int


@dataclass(frozen=True)
class Opened:
    """What comes out: a weighted sum of updates, the sum of the weights, and how many updates kept to the bound."""

    total: Tensors
    weight: int
    within: int


class Guard(ABC):
    """The coordinator's half, made anew for every attempt at a round."""

    @abstractmethod
    async def prepare(self, post: Post, cohort: Sequence[int]) -> list[int]:
        """Exchange what must be known before the work; return the nodes that can take part.

        Raises
        ------
        ParcelError
            When too few are left: the attempt is abandoned.
        """

    @abstractmethod
    def terms(self) -> dict[str, Any]:
        """What every brief's header tells the parties, the same for all; JSON."""

    @abstractmethod
    def check(self, node: int, parcel: Parcel) -> None:
        """Refuse a hidden answer of the wrong form with ``ParcelError``."""

    @abstractmethod
    async def open(self, post: Post, answers: Iterable[Sealed]) -> Opened:
        """Return the sum of what the answers hide; they are taken one by one.

        Raises
        ------
        ParcelError
            When it cannot be opened: the attempt is abandoned.
        """

    def close(self) -> None:  # noqa: B027
        """Let go of what the attempt held; nothing, for most."""


def size_of(shapes: Shapes) -> int:
    """Count the numbers of an update."""
    return sum(math.prod(shape) for shape in shapes.values())


def check_weight(node: int, parcel: Parcel, weights: Mapping[int, int]) -> None:
    """Refuse an answer that says it counts for more or fewer examples than its node was known to hold."""
    if parcel.header.get("samples") != weights[node] and weights[node] != 1:
        raise ParcelError(f"node {node} counts for {weights[node]} samples and says it has another number")


class PartyGuard(ABC):
    """The party's half."""

    @abstractmethod
    def answer(self, node: int, message: Parcel, kept: Tensors) -> tuple[Parcel, Tensors]:
        """Answer one of the guard's own messages; return what leaves and what is kept."""

    @abstractmethod
    def seal(
        self, node: int, update: Tensors, weight: int, within: bool, terms: Mapping[str, Any], kept: Tensors
    ) -> tuple[Tensors, Tensors]:
        """Hide an update, as it is to count; return the tensors that leave and what is kept."""
