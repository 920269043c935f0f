"""The peer engine: members of a swarm announce themselves, watch each other, call each other, and stream.

``Peers`` is all that segments know of a network. What carries the frames is a subclass with three methods; all else is
the same on each. ``peers_memory`` is the public twin for tests and simulation, ``peers_zenoh`` the real one.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

from mycel.engines.calls import Calls
from mycel.engines.identity import Announcement, Identity, verified
from mycel.errors import EngineError

Kind = Literal["joined", "changed", "left"]


@dataclass(frozen=True)
class Change:
    """Something that happened to a member of the swarm."""

    kind: Kind
    name: str
    facts: dict[str, Any]


class Peers(Calls):
    """One member's view of its swarm.

    Parameters
    ----------
    identity : Identity
        Issued by the swarm's authority.
    """

    def __init__(self, identity: Identity) -> None:
        super().__init__(identity.name)
        self.identity = identity
        self._known: dict[str, tuple[Announcement, float]] = {}
        self._watchers: list[asyncio.Queue[Change | None]] = []
        self._renewal: asyncio.Task[None] | None = None
        self._expiry: dict[str, asyncio.TimerHandle] = {}

    @abstractmethod
    def _publish(self, announcement: bytes | None) -> None:
        """Make an announcement known to all members, those who come later too; None: withdraw it."""

    @abstractmethod
    async def _leave(self) -> None:
        """Let go of the network; every member learns that this one is gone."""

    async def announce(self, facts: dict[str, Any], lease: float = 15.0) -> None:
        """Say what this member offers; said again while it lives, and void ``lease`` seconds after it fell silent."""
        await self.withdraw(silently=True)

        async def renew() -> None:
            while True:
                await asyncio.sleep(lease / 3)
                self._publish(self.identity.sign(facts, lease))

        self._publish(self.identity.sign(facts, lease))
        self._renewal = asyncio.create_task(renew())

    async def withdraw(self, silently: bool = False) -> None:
        """Take the announcement back; calls are still answered."""
        if self._renewal is not None:
            self._renewal.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._renewal
            self._renewal = None
            if not silently:
                self._publish(None)

    def members(self) -> dict[str, dict[str, Any]]:
        """Return what the other members announce, by name."""
        return {name: found.facts for name, (found, _) in sorted(self._known.items())}

    async def watch(self) -> AsyncIterator[Change]:
        """Yield who is there, then every change, until this member closes."""
        queue: asyncio.Queue[Change | None] = asyncio.Queue()
        for name, facts in self.members().items():
            queue.put_nowait(Change("joined", name, facts))
        self._watchers.append(queue)
        try:
            while (change := await queue.get()) is not None:
                yield change
        finally:
            self._watchers.remove(queue)

    async def close(self) -> None:
        """Leave the swarm; what others await of this member fails at once."""
        if self._closed:
            return
        self._closed = True
        await self.withdraw(silently=True)
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for handle in self._expiry.values():
            handle.cancel()
        self._unanswered("")
        for queue in self._watchers:
            queue.put_nowait(None)
        await self._leave()

    def _present(self, peer: str) -> bool:
        return peer in self._known

    def _heard(self, frame: bytes) -> None:
        """Take in an announcement; one that is forged, stale or older than what is known is dropped."""
        with contextlib.suppress(EngineError):
            said = verified(frame, self.identity.authority)
            known = self._known.get(said.name)
            if self._closed or said.name == self.name or (known and known[0].issued >= said.issued):
                return
            self._known[said.name] = (said, self._loop.time())
            if handle := self._expiry.pop(said.name, None):
                handle.cancel()
            self._expiry[said.name] = self._loop.call_later(said.lease, self._gone, said.name)
            if known is None or known[0].facts != said.facts:
                self._tell(Change("changed" if known else "joined", said.name, said.facts))

    def _gone(self, peer: str) -> None:
        """Take note that a member is no longer there: everything awaited of it fails now."""
        self._unanswered(peer)
        if handle := self._expiry.pop(peer, None):
            handle.cancel()
        if (known := self._known.pop(peer, None)) is not None:
            self._tell(Change("left", peer, known[0].facts))

    def _tell(self, change: Change) -> None:
        for queue in self._watchers:
            queue.put_nowait(change)
