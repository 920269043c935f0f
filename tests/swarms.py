"""Swarms in memory and as processes, for tests of segments."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mycel.engines.peers_memory import MemoryPeers, MemorySwarm
from mycel.models.cut import Cut
from mycel.segments.client import SwarmModel, fingerprint
from mycel.segments.host import Host
from mycel.segments.segment import Segment
from mycel.segments.weights import Weights
from mycel.segments.window import Window


@dataclass
class Bench:
    """A swarm in memory with its hosts and a door."""

    swarm: MemorySwarm
    hosts: list[Host]
    members: list[MemoryPeers]
    model: SwarmModel
    folder: Path
    windows: list[Window] = field(default_factory=list)

    def member(self, name: str) -> MemoryPeers:
        return next(member for member in self.members if member.name == name)

    async def lend(
        self, name: str, first: int, last: int, kind: type[Host] = Host, weights: Weights | None = None
    ) -> Host:
        if weights is not None and weights.window:
            window = Window(self.folder, weights.window, False, False, first, last, weights.held)
            self.windows.append(window)
            cut = window.cut
        else:
            mapped = weights is not None and weights.kind == "mapped"
            cut = Cut.open(self.folder, first, last, embed=False, head=False, mapped=mapped)
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
    patience: float = 60.0,
    weights: Weights | None = None,
) -> AsyncIterator[Bench]:
    swarm = MemorySwarm(latency)
    door = await swarm.join("door")
    made = Bench(swarm, [], [], await SwarmModel.open(door, folder, codec, patience), folder)
    try:
        for index, (first, last) in enumerate(ranges):
            await made.lend(f"peer-{index}", first, last, weights=weights)
        while len(made.model.directory.latency) < len(ranges):  # what probes them is a call, too
            await asyncio.sleep(0.001)
        yield made
    finally:
        await made.model.close()
        await asyncio.gather(*(host.close() for host in made.hosts))
        await asyncio.gather(door.close(), *(member.close() for member in made.members))
        for window in made.windows:
            window.close()
