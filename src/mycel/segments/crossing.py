"""Sessions that share a route, on their way from its first block to its last in one step.

Each peer hands on to the next as soon as it has computed, so a step takes one message a peer and one back. What every
peer computed comes here too, beside the way: it is what a lost neighbour is rebuilt from. A peer that is handed
nothing, because two neighbours cannot reach each other, is asked from here.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mycel.decisions.routing import Leg
from mycel.engines.calls import PeerLost, PeerRefused, Ticket
from mycel.errors import EngineError, ParcelError
from mycel.segments.boundary import Boundary, sound
from mycel.segments.session import Hop, Session
from mycel.segments.steps import NOBODY, Step, Stop

if TYPE_CHECKING:
    from mycel.segments.client import SwarmModel

MOST_ATTEMPTS = 32  # replacements in one step, after which the swarm is too unsteady to go on


class Crossing:
    """One step of sessions that share a route.

    Parameters
    ----------
    model : SwarmModel
        Whose.
    sessions : list of Session
        Their first hop has what is to be computed.
    starts : list of int
        Where each session's new positions begin.
    """

    def __init__(self, model: SwarmModel, sessions: list[Session], starts: list[int]) -> None:
        self.model, self.sessions, self.starts = model, sessions, starts
        self.turn = next(model.turns)
        self._coming: list[Ticket] = []  # answers of the next hops, which their neighbours ask
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Compute; each session's ``out`` is then what became of its new positions."""
        place = attempts = 0
        lost_at: float | None = None
        try:
            while place < len(self.sessions[0].hops):
                began = self._loop.time()
                try:
                    answers = await self._cross(place)
                except (PeerLost, PeerRefused, ParcelError) as error:
                    attempts += 1
                    if attempts > MOST_ATTEMPTS:
                        raise EngineError(f"{attempts} peers failed in one step, last: {error}") from error
                    lost_at = began if lost_at is None else lost_at
                    self._expect_no_more()
                    self.turn = next(self.model.turns)
                    await self._replace(place, error, self._loop.time() - began)
                    continue
                if lost_at is not None:
                    self.model.pauses.append(self._loop.time() - lost_at)
                    self.model.notice("resumed", pause=self.model.pauses[-1])
                    lost_at = None
                self._keep(place, answers)
                place += 1
        finally:
            self._expect_no_more()

    def _hops(self, place: int) -> list[Hop]:
        return [session.hops[place] for session in self.sessions]

    async def _cross(self, place: int) -> list[tuple[int, Tensor]]:
        """Have one hop computed; return for each session from where on, and the states."""
        hops = self._hops(place)
        leg, known = hops[0].leg, self.model.directory.known[hops[0].leg.peer]
        if self.model.directory.banned(leg.peer):  # it failed a moment ago: waiting again would be in vain
            raise PeerRefused(f"the peer {leg.peer!r} has just failed")
        counts = [len(hop.inputs) - hop.held for hop in hops]
        total = sum(counts)
        within = known.allowance(total, self.model.patience)
        started = self._loop.time()
        if self._coming:
            answer = await self._handed(place, self._coming.pop(0), within)
        else:
            self._coming = self._expected(place)
            ticket = self._ask(place, self._coming)
            answer = await self.model.peers.answer((ticket,), within)
        parcel = Boundary.unpack(answer, ("stepped", "lost"))
        if parcel.kind == "lost":
            self._expect_no_more()
            if all(hop.held == 0 for hop in hops):
                raise ParcelError(f"the peer {leg.peer!r} says that it lost what it was never sent")
            self.model.count_replay(hops)
            return await self._cross(place)
        states = sound(parcel, "hidden", (total, self.model.width))
        known.learn(total, self._loop.time() - started)
        if self._coming and not parcel.header.get("handed"):
            self._expect_no_more()
            self._apart(place)
        return [(hop.held, part) for hop, part in zip(hops, torch.split(states, counts), strict=True)]

    async def _handed(self, place: int, ticket: Ticket, within: float) -> bytes:
        """Wait for what a neighbour has asked for; when half the time is over, ask as well."""
        peers = self.model.peers
        try:
            return await peers.answer((ticket,), within / 2, keep=True)
        except PeerLost:
            if ticket.came.done():
                raise
        self._expect_no_more()
        second = self._ask(place, [])
        answer = await peers.answer((ticket, second), within / 2)
        if not ticket.came.done():
            self._apart(place - 1)
        return answer

    def _ask(self, place: int, coming: list[Ticket]) -> Ticket:
        """Send a hop what it does not hold yet, and whom to hand on to."""
        model, hops = self.model, self._hops(place)
        legs = [self._hops(place + index) for index in range(1 + len(coming))]
        stops = tuple(Stop(*_place(leg[0]), tuple(hop.key for hop in leg)) for leg in legs)
        rows = torch.tensor([[hop.held, len(hop.inputs) - hop.held, self.turn] for hop in hops])
        parts = [hop.inputs[hop.held :] for hop in hops]
        numbers = b"".join(ticket.number for ticket in coming)
        awaited = torch.frombuffer(bytearray(numbers), dtype=torch.uint8).view(-1, 16) if coming else NOBODY
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
        frame = model.forms.frame(model.boundary, Step(model.model, stops, rows, hidden, awaited))
        return model.peers.ask(stops[0].peer, "step", frame)

    def _expected(self, place: int) -> list[Ticket]:
        """Await the answers of the hops behind this one that can go on from where it ends."""
        directory, tickets = self.model.directory, list[Ticket]()
        if any(hop.held != start for hop, start in zip(self._hops(place), self.starts, strict=True)):
            return tickets  # a part of what this hop computes, the others hold already
        for index in range(place + 1, len(self.sessions[0].hops)):
            before, hops = self._hops(index - 1)[0].leg.peer, self._hops(index)
            peer = hops[0].leg.peer
            ready = all(hop.held >= start for hop, start in zip(hops, self.starts, strict=True))
            if not ready or peer == before or directory.banned(peer) or (before, peer) in directory.apart:
                break
            for hop, start in zip(hops, self.starts, strict=True):
                hop.held = start
            tickets.append(self.model.peers.expect(peer))
        return tickets

    def _keep(self, place: int, answers: list[tuple[int, Tensor]]) -> None:
        for session, (begin, states), start in zip(self.sessions, answers, self.starts, strict=True):
            hop = session.hops[place]
            if place + 1 < len(session.hops):
                follower = session.hops[place + 1]
                enter = max(begin, min(len(follower.inputs), start))
                follower.receive(states[enter - begin :], enter)
            else:
                session.out = states[start - begin :]
            hop.held = len(hop.inputs)

    async def _replace(self, place: int, error: EngineError | ParcelError, waited: float) -> None:
        directory, leg = self.model.directory, self.sessions[0].hops[place].leg
        patience = self.model.patience
        if isinstance(error, ParcelError):
            directory.lied(leg.peer, patience)
        elif isinstance(error, PeerLost):
            directory.late(leg.peer, waited, patience)
        legs = await directory.route(leg.first, leg.last, patience, avoid=leg.peer)
        self._tell_lost(leg, legs, sum(len(hop.inputs) for hop in self._hops(place)), error)
        for session in self.sessions:
            self.model.count_replay([session.hops[place]])
            session.replayed += len(session.hops[place].inputs)
            session.hops[place : place + 1] = session.hops[place].replaced(legs)

    def _tell_lost(self, leg: Leg, legs: tuple[Leg, ...], positions: int, error: Exception) -> None:
        how = {"peer": leg.peer, "first": leg.first, "last": leg.last, "why": str(error)[:200]}
        self.model.notice("lost", **how, to=[each.peer for each in legs], positions=positions)

    def _apart(self, place: int) -> None:
        """Take note that the peer of one hop does not reach that of the next."""
        self.model.directory.apart.add((self._hops(place)[0].leg.peer, self._hops(place + 1)[0].leg.peer))

    def _expect_no_more(self) -> None:
        self.model.peers.drop(self._coming)
        self._coming = []


def _place(hop: Hop) -> tuple[str, int, int]:
    return hop.leg.peer, hop.leg.first, hop.leg.last
