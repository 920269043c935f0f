"""A machine that lends itself to a swarm: it weighs its memory, takes the blocks that are needed most, and moves."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from mycel.decisions.placement import Held, Neediest, Range, Situation
from mycel.engines.peers import Peers
from mycel.errors import EngineError
from mycel.models.anatomy import anatomy
from mycel.models.cut import Cut, read_config
from mycel.models.linear import quicken
from mycel.models.shards import Shards
from mycel.segments.client import fingerprint
from mycel.segments.host import Host
from mycel.segments.keys import Slab
from mycel.segments.segment import Segment
from mycel.segments.weights import Weights
from mycel.segments.window import Window

SHARE = 0.5  # of the free memory, where no limit is given
RESERVE = 256 << 20  # bytes for the interpreter and its libraries
SETTLE = 3.0  # seconds in which a swarm's announcements become known
UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


class Lender:
    """Serves as many blocks as memory allows, where the swarm needs them.

    Parameters
    ----------
    peers : Peers
        This member.
    folder : Path
        The model.
    memory : int
        Bytes that may be used; 0: half of what is free.
    blocks : tuple of int, optional
        Serve exactly these; by default the neediest, for as long as no other place is better.
    say : callable
        Told in a sentence what happens.
    weights : str
        Where weights are, as ``segments.weights.Weights`` reads it. Where not all of them are in memory, a machine
        takes blocks for which it has none, and reads them for each step.
    """

    def __init__(
        self,
        peers: Peers,
        folder: Path,
        memory: int = 0,
        blocks: Range | None = None,
        say: Callable[[str], None] = lambda sentence: None,
        weights: str = "resident",
    ) -> None:
        self.peers, self.folder, self.blocks, self.say = peers, folder, blocks, say
        self.model = fingerprint(folder)
        self.depth, self.block_bytes = weigh(folder)
        self.weights, self.free = Weights.parse(weights), free(memory)
        fitting = self.depth if blocks is not None else room(memory, self.block_bytes, self.depth)
        if self._in_memory(self.depth) > fitting and self.weights.window:
            raise EngineError(
                f"--weights {weights} keeps {self._in_memory(self.depth)} blocks in memory; {fitting} fit"
            )
        self.room = fitting if self.weights.kind == "resident" else self.depth
        self._windows: list[Window] = []
        self.decision = Neediest()
        self.host: Host | None = None
        self._moving: asyncio.Task[None] | None = None

    async def start(self, period: float = 20.0, settle: float = SETTLE) -> None:
        """Take blocks and announce them; every ``period`` seconds see whether to move."""
        if self.blocks is None:
            await asyncio.sleep(settle)
        chosen = self.blocks or self.decision.decide(self._situation(None, 1.0))
        self.host = Host(self.peers, await self._load(chosen), self.model)
        await self.host.start()
        self.say(f"serves blocks {chosen[0]} to {chosen[1] - 1} of {self.depth}, {1 / self.host.seconds:,.0f} blocks/s")
        if self.blocks is None:
            self._moving = asyncio.create_task(self._move(period))

    async def close(self) -> None:
        """Stop serving; the member itself stays."""
        if self._moving is not None:
            self._moving.cancel()
            await asyncio.gather(self._moving, return_exceptions=True)
        if self.host is not None:
            await self.host.close()
        self._let_go(0)

    async def reconsider(self) -> bool:
        """Move if another place would serve the swarm much better; return whether it did."""
        host = self.host
        assert host is not None
        now = (host.segment.first, host.segment.last)
        better = self.decision.decide(self._situation(now, self._throughput(host)))
        if better == now:
            return False
        self.say(f"moves from blocks {now[0]} to {now[1] - 1} to blocks {better[0]} to {better[1] - 1}")
        await host.replace(await self._load(better))
        self._let_go(1)
        return True

    async def _move(self, period: float) -> None:
        # Peers that all see the same gap would all jump into it: each waits its own share of the period first.
        offset = int.from_bytes(self.peers.name.encode()[-4:], "big") % 1000 / 1000
        await asyncio.sleep(period * offset)
        while True:
            await asyncio.sleep(period)
            try:
                await self.reconsider()
            except Exception as error:  # it goes on with the blocks that it has
                self.say(f"cannot move ({type(error).__name__}: {error})"[:300])

    async def _load(self, chosen: Range) -> Segment:
        first, last = chosen
        if not 0 <= first < last <= self.depth:
            raise EngineError(f"blocks {first}:{last} are asked for; the model has blocks 0:{self.depth}")
        return await asyncio.to_thread(self._open, first, last)

    def _open(self, first: int, last: int) -> Segment:
        where = self.weights
        if where.window:
            self._windows.append(Window(self.folder, where.window, False, False, first, last, where.held))
            cut = self._windows[-1].cut
        else:
            cut = Cut.open(self.folder, first, last, embed=False, head=False, mapped=where.kind == "mapped")
        quicken(cut.model, pack=False)
        positions = int(getattr(cut.config, "max_position_embeddings", 0) or Slab().positions)
        left = max(self.free - self._in_memory(last - first) * self.block_bytes, self.free // 3)
        return Segment(cut, slab=Slab(positions=positions, memory=max(1, left // (last - first))))

    def _in_memory(self, blocks: int) -> int:
        """Return how many of so many blocks are in memory at a time; those in their file are nobody's."""
        where = self.weights
        held = {"resident": blocks, "mapped": 0}.get(where.kind, where.window + where.held)
        return min(held, blocks)

    def _let_go(self, kept: int) -> None:
        """Close windows that nothing is read through any more, all but the latest ``kept``."""
        while len(self._windows) > kept:
            self._windows.pop(0).close()

    def _situation(self, now: Range | None, throughput: float) -> Situation:
        others = tuple(
            Held(
                name, facts["first"], facts["last"], 1 / max(facts["seconds"] * (facts["last"] - facts["first"]), 1e-9)
            )
            for name, facts in self.peers.members().items()
            if facts.get("model") == self.model and facts.get("depth") == self.depth and _sane(facts, self.depth)
        )
        if now is None and others:  # before it has measured itself, a machine takes itself for an average one
            throughput = sum(held.throughput for held in others) / len(others)
        return Situation(self.depth, min(self.room, self.depth), throughput, others, now)

    @staticmethod
    def _throughput(host: Host) -> float:
        return 1 / max(host.seconds * (host.segment.last - host.segment.first), 1e-9)


def weigh(folder: Path) -> tuple[int, int]:
    """Return the number of blocks of a model and the bytes of the largest in float32, without reading weights."""
    parts = anatomy(read_config(folder))
    shards = Shards.of(folder)
    known = shards.files
    sizes = []
    for index in range(parts.depth):
        names = [name for name in known if f".{parts.blocks}.{index}." in f".{name}"]
        sizes.append(shards.elements(names) * torch.float32.itemsize)
    if not max(sizes, default=0):
        raise EngineError(f"the weights in {folder} name no blocks: save the model again")
    return parts.depth, max(sizes)


def room(memory: int, block_bytes: int, depth: int) -> int:
    """Return how many blocks fit into ``memory`` bytes (0: half of what is free), with a third for sessions."""
    fitting = int(free(memory) / (1.5 * block_bytes))
    if fitting < 1:
        raise EngineError(
            f"memory of {memory or psutil.virtual_memory().available:,} bytes holds no block of {block_bytes:,} bytes"
            f" beside {RESERVE:,} for the libraries: raise --memory"
        )
    return min(fitting, depth)


def free(memory: int) -> int:
    """Return the bytes for blocks and sessions where ``memory`` may be used; 0: half of what is free now."""
    return max(0, memory - RESERVE) if memory else int(psutil.virtual_memory().available * SHARE)


def parse_memory(text: str) -> int:
    """Return the bytes of ``4GiB``, ``500MB`` or a plain number; empty: 0."""
    match = re.fullmatch(r"\s*([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*([a-z]*)\s*", text.lower()) if text else None
    if text and (match is None or match[2] not in UNITS):
        raise EngineError(f"--memory is {text[:40]!r}: a size such as 4GiB or 500MB is needed")
    return int(float(match[1]) * UNITS[match[2]]) if match else 0


def parse_blocks(text: str) -> Range | None:
    """Return (first, last) of ``4:8``, or None for ``auto``."""
    if text == "auto":
        return None
    match = re.fullmatch(r"([0-9]{1,5}):([0-9]{1,5})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise EngineError(f"--blocks is {text[:40]!r}: auto, or first:last such as 0:8, is needed")
    return int(match[1]), int(match[2])


def _sane(facts: dict[str, object], depth: int) -> bool:
    first, last, seconds = facts.get("first"), facts.get("last"), facts.get("seconds")
    return (
        isinstance(first, int)
        and isinstance(last, int)
        and isinstance(seconds, int | float)
        and 0 <= first < last <= depth
        and 0 < seconds < 1e6
    )
