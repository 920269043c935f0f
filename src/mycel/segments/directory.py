"""Who serves which blocks of a model, how fast, and who is not to be asked for a while."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections import defaultdict
from typing import Any

from mycel.decisions.contract import Decision
from mycel.decisions.routing import Fastest, Leg, Offer, Wanted
from mycel.engines.peers import Peers
from mycel.errors import EngineError
from mycel.segments.patience import Patience

UNKNOWN = 0.005  # seconds of latency before a peer was asked: at no cost a route would hop to and fro


class Directory:
    """One member's knowledge of the peers that serve a model.

    Parameters
    ----------
    peers : Peers
        This member.
    model : str
        The model's fingerprint.
    depth : int
        Its number of blocks.
    decision : Decision, optional
        Chooses routes; by default the fastest.
    """

    def __init__(
        self, peers: Peers, model: str, depth: int, decision: Decision[Wanted, tuple[Leg, ...]] | None = None
    ) -> None:
        self.peers, self.model, self.depth = peers, model, depth
        self.decision = decision or Fastest()
        self.known: defaultdict[str, Patience] = defaultdict(Patience)
        self.training: defaultdict[tuple[str, str], Patience] = defaultdict(Patience)  # by peer and verb
        self.latency: dict[str, float] = {}
        self.apart: set[tuple[str, str]] = set()  # who cannot hand on to whom, until one of them comes anew
        self._changed = asyncio.Event()
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Stop watching."""
        self._watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watching

    def offers(self) -> tuple[Offer, ...]:
        """Return what sound announcements offer, without those who are banned."""
        found = (self._offer(name, facts) for name, facts in self.peers.members().items())
        return tuple(offer for offer in found if offer and not self.banned(offer.peer))

    async def route(self, first: int, last: int, patience: float, avoid: str = "") -> tuple[Leg, ...]:
        """Return a route through blocks ``first <= index < last``.

        Parameters
        ----------
        first, last : int
            Blocks to be covered.
        patience : float
            Seconds to wait for peers that hold what is missing.
        avoid : str
            A peer to do without where another will do.

        Raises
        ------
        EngineError
            When some block stays without a peer; the message says which.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + patience
        while True:
            self._changed.clear()
            offers = self.offers()
            for fewer in (tuple(offer for offer in offers if offer.peer != avoid), offers):
                try:
                    return self.decision.decide(Wanted(first, last, fewer))
                except EngineError as error:
                    fault = error
            left = until - loop.time()
            if left <= 0:
                raise EngineError(f"{fault} (waited {patience:g} s)") from fault
            now = loop.time()
            bans = [known.banned_until - now for known in self.known.values() if known.banned_until > now]
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min([left, 0.5, *bans]))

    def late(self, peer: str, waited: float, patience: float) -> None:
        """Take note that a peer did not answer within ``waited`` seconds, or left."""
        self.known[peer].late(asyncio.get_running_loop().time(), waited, patience)

    def lied(self, peer: str, patience: float) -> None:
        """Take note that a peer answered what cannot be."""
        self.known[peer].lied(asyncio.get_running_loop().time(), patience)

    def banned(self, peer: str) -> bool:
        """Return whether a peer is not to be asked now."""
        return self.known[peer].banned_until > asyncio.get_running_loop().time()

    async def _watch(self) -> None:
        async for change in self.peers.watch():
            if change.kind == "left":
                self.latency.pop(change.name, None)
                self.apart = {pair for pair in self.apart if change.name not in pair}
                self.known[change.name].banned_until = 0.0
            elif self._offer(change.name, change.facts) is not None and change.name not in self.latency:
                self.latency[change.name] = await self._probe(change.name)
            self._changed.set()

    async def _probe(self, peer: str) -> float:
        """Return the seconds of a small echo, the shorter of two."""
        loop, best = asyncio.get_running_loop(), math.inf
        with contextlib.suppress(EngineError):
            for _ in range(2):
                started = loop.time()
                await self.peers.call(peer, "echo", os.urandom(64), within=5.0)
                best = min(best, loop.time() - started)
        return best if best < math.inf else 5.0

    def _offer(self, name: str, facts: dict[str, Any]) -> Offer | None:
        """Read an announcement; None when it is for another model or makes no sense."""
        first, last, seconds = facts.get("first"), facts.get("last"), facts.get("seconds")
        sane = type(first) is int and type(last) is int and 0 <= first < last <= self.depth
        if facts.get("model") != self.model or not sane or not isinstance(seconds, int | float):
            return None
        if not 0 <= seconds < math.inf:
            return None
        assert isinstance(first, int)
        assert isinstance(last, int)
        return Offer(name, first, last, float(seconds), self.latency.get(name, UNKNOWN))
