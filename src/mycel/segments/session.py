"""One sequence on its way over a route, and what its owner keeps to rebuild what a lost peer held."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mycel.decisions.routing import Leg


class Hop:
    """A leg of the route with everything that was sent into it.

    Parameters
    ----------
    leg : Leg
        Peer and blocks.
    inputs : Tensor
        ``[positions, width]``: enough to rebuild the peer's keys and values anywhere.

    Attributes
    ----------
    key : str
        The session's name at that peer, known to it and to the peer before it.
    held : int
        Positions that the peer is known to hold.
    """

    def __init__(self, leg: Leg, inputs: Tensor) -> None:
        self.leg, self._kept, self._length = leg, inputs, len(inputs)
        self.key = secrets.token_urlsafe(16)
        self.held = 0

    @property
    def inputs(self) -> Tensor:
        """Return what was sent, ``[positions, width]``."""
        return self._kept[: self._length]

    def receive(self, states: Tensor, start: int) -> None:
        """Keep what enters here from position ``start`` on, in place of what was there."""
        self._length = start + len(states)
        if self._length > len(self._kept):
            grown = states.new_empty(max(2 * len(self._kept), self._length), states.shape[1])
            grown[:start] = self._kept[:start]
            self._kept = grown
        self._kept[start : self._length] = states
        self.held = min(self.held, start)

    def replaced(self, legs: tuple[Leg, ...]) -> list[Hop]:
        """Return the hops that take this one's place: the first has all inputs, and nobody holds anything yet."""
        return [Hop(leg, self.inputs if place == 0 else self.inputs[:0]) for place, leg in enumerate(legs)]


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
