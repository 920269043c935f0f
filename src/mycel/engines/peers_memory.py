"""The peer engine's twin in memory: the same calls, streams and losses without a network, on any clock."""

from __future__ import annotations

import asyncio

from mycel.engines.identity import Authority, Identity, verified
from mycel.engines.peers import Peers
from mycel.errors import EngineError


class MemorySwarm:
    """Where members of a simulated swarm meet.

    Parameters
    ----------
    latency : float
        Seconds that every frame takes.
    bandwidth : float
        Bytes a second of every link; infinite by default.
    """

    def __init__(self, latency: float = 0.0, bandwidth: float = float("inf")) -> None:
        self.authority = Authority.new("in-memory")
        self.latency, self.bandwidth = latency, bandwidth
        self.here: dict[str, MemoryPeers] = {}
        self.announced: dict[str, bytes] = {}
        self._free: dict[tuple[str, str], float] = {}

    async def join(self, name: str) -> MemoryPeers:
        """Return a new member."""
        return MemoryPeers(self, self.authority.issue(name))

    def carry(self, sender: str, receiver: str, frame: bytes) -> None:
        """Deliver a frame after the link's time; frames of one link keep their order."""
        loop = asyncio.get_running_loop()
        start = max(loop.time(), self._free.get((sender, receiver), 0.0))
        self._free[sender, receiver] = start + len(frame) / self.bandwidth
        arrival = self._free[sender, receiver] + self.latency
        if receiver in self.here:
            loop.call_at(arrival, self.here[receiver]._arrived, frame)


class MemoryPeers(Peers):
    """A member of a ``MemorySwarm``."""

    def __init__(self, swarm: MemorySwarm, identity: Identity) -> None:
        super().__init__(identity)
        self._swarm = swarm
        # A certificate of another authority opens nothing here, as it would not on a network.
        try:
            verified(identity.sign({}, 1.0), swarm.authority.certificate)
            self._admitted = identity.name not in swarm.here
        except EngineError:
            self._admitted = False
        if self._admitted:
            swarm.here[identity.name] = self
            for frame in swarm.announced.values():
                self._heard(frame)

    def kill(self) -> None:
        """Vanish as a killed process does: nothing is said, whoever waits learns it from the network."""
        self._swarm.here.pop(self.name, None)
        self._swarm.announced.pop(self.name, None)
        for other in list(self._swarm.here.values()):
            other._loop.call_soon(other._gone, self.name)

    def _send(self, peer: str, frame: bytes) -> None:
        if self._admitted and self.name in self._swarm.here:
            self._swarm.carry(self.name, peer, frame)

    def _present(self, peer: str) -> bool:
        return self._admitted and peer in self._swarm.here

    def _publish(self, announcement: bytes | None) -> None:
        if not self._admitted or self.name not in self._swarm.here:
            return
        if announcement is None:
            self._swarm.announced.pop(self.name, None)
        else:
            self._swarm.announced[self.name] = announcement
        for name, other in list(self._swarm.here.items()):
            if name != self.name and announcement is not None:
                other._heard(announcement)
            elif name != self.name:
                other._gone(self.name)

    async def _leave(self) -> None:
        if self._admitted and self._swarm.here.get(self.name) is self:
            self.kill()
        await asyncio.sleep(0)
