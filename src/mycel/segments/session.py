"""One sequence on its way over a route, and what its owner keeps to rebuild what a lost peer held."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mycel.decisions.routing import Leg


@dataclass
class Hop:
    """A leg of the route with everything that was sent into it.

    Attributes
    ----------
    leg : Leg
        Peer and blocks.
    key : str
        The session's name at that peer, which nobody else can guess.
    inputs : Tensor
        ``[positions, width]``: enough to rebuild the peer's keys and values anywhere.
    held : int
        Positions that the peer is known to hold.
    """

    leg: Leg
    inputs: Tensor
    key: str = field(default_factory=lambda: os.urandom(16).hex())
    held: int = 0

    def receive(self, states: Tensor, start: int) -> None:
        """Keep what enters here from position ``start`` on, in place of what was there."""
        self.inputs = torch.cat([self.inputs[:start], states])
        self.held = min(self.held, start)

    def replaced(self, legs: tuple[Leg, ...]) -> list[Hop]:
        """Return the hops that take this one's place: the first has all inputs, and nobody holds anything yet."""
        empty = self.inputs[:0]
        return [Hop(leg, self.inputs if place == 0 else empty) for place, leg in enumerate(legs)]


@dataclass
class Session:
    """A sequence that is being generated.

    Attributes
    ----------
    hops : list of Hop
        The route; empty before the first step.
    length : int
        Positions computed.
    replayed : int
        Positions that were sent again because a peer was lost.
    out : Tensor
        What the last step's new positions became behind the last block, ``[positions, width]``.
    """

    hops: list[Hop] = field(default_factory=list)
    length: int = 0
    replayed: int = 0
    out: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def route(self) -> tuple[Leg, ...]:
        """Return the legs."""
        return tuple(hop.leg for hop in self.hops)
