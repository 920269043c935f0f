"""Swarms in memory and as processes, for tests of segments."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from mycel.engines.peers_memory import MemoryPeers, MemorySwarm
from mycel.models.cut import Cut
from mycel.segments.client import SwarmModel, fingerprint
from mycel.segments.host import Host
from mycel.segments.segment import Segment


@dataclass
class Bench:
    """A swarm in memory with its hosts and a door."""

    swarm: MemorySwarm
    hosts: list[Host]
    members: list[MemoryPeers]
    model: SwarmModel
    folder: Path

    def member(self, name: str) -> MemoryPeers:
        return next(member for member in self.members if member.name == name)

    async def lend(self, name: str, first: int, last: int, kind: type[Host] = Host) -> Host:
        cut = Cut.open(self.folder, first, last, embed=False, head=False)
        member = await self.swarm.join(name)
        host = kind(member, Segment(cut), fingerprint(self.folder))
        self.hosts.append(host)
        self.members.append(member)
        await host.start()
        return host


@asynccontextmanager
async def bench(
    folder: Path,
    ranges: Sequence[tuple[int, int]],
    latency: float = 0.0,
    codec: str = "raw",
    patience: float = 5.0,
) -> AsyncIterator[Bench]:
    swarm = MemorySwarm(latency)
    door = await swarm.join("door")
    made = Bench(swarm, [], [], await SwarmModel.open(door, folder, codec, patience), folder)
    try:
        for index, (first, last) in enumerate(ranges):
            await made.lend(f"peer-{index}", first, last)
        yield made
    finally:
        await made.model.close()
        await asyncio.gather(*(host.close() for host in made.hosts))
        await asyncio.gather(door.close(), *(member.close() for member in made.members))
