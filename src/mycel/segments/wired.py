"""Training through stages that many peers serve: each micro-batch finds its own way, and a lost peer's work is redone.

Runs on any asyncio loop; on a virtual clock, peers' speeds cost virtual seconds while the tensors are really computed.
What entered a stage and what came back to it is kept by the owner until the step ends. A peer that leaves takes along
the gradients it has gathered: the micro-batches they were of go backwards through that stage once more, at others. So
the sum of the gradients, and with it the loss curve, is that of a run in which nobody left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mycel.decisions.wiring import Crew, Rebalance, Wiring
from mycel.segments.stages import Stages

BACK = 2.0  # a way back takes twice the way forward


class Gone(Exception):
    """The peer left while it was asked."""


@dataclass
class Peer:
    """One machine: seconds of a forward at any stage, the stage it serves, and the gradients it has gathered.

    Attributes
    ----------
    gathered : dict of int to list of Tensor
        By micro-batch, the gradients of the stage's weights.
    """

    name: str
    seconds: float
    stage: int
    there: bool = True
    gathered: dict[int, list[Tensor]] = field(default_factory=dict)
    served: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Swarm:
    """Peers over the stages of one model, which all peers of a stage hold alike.

    Parameters
    ----------
    stages : Stages
        The computation; its weights stand for every peer's copy, which the end of a step makes equal again.
    peers : sequence of Peer
        At least one a stage.
    fetch : float
        Seconds in which a peer that moves downloads its new stage.

    Attributes
    ----------
    moves, redone : int
        Peers that changed their stage, and micro-batches that went backwards again for a lost peer.
    """

    def __init__(self, stages: Stages, peers: Sequence[Peer], seed: int = 0, fetch: float = 0.0) -> None:
        self.stages, self.peers, self.fetch = stages, list(peers), fetch
        self.moves = self.redone = 0
        self.wiring = [Wiring(seed + index) for index in range(len(stages.segments))]
        for peer in self.peers:
            self.wiring[peer.stage].join(peer.name, peer.seconds)
        self._by_name = {peer.name: peer for peer in self.peers}
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._ends: list[Tensor] = []

    async def gradients(self, rows_BT: Tensor, pieces: int, at_once: int) -> float:
        """Add the gradient of the mean loss to the weights'; at most ``at_once`` micro-batches are under way."""
        count, gate = rows_BT.shape[0] * (rows_BT.shape[1] - 1), asyncio.Semaphore(at_once)
        self._kept.clear()

        async def one(index: int, piece: Tensor) -> float:
            async with gate:
                return await self._through(index, piece, count)

        losses = await asyncio.gather(*(one(index, piece) for index, piece in enumerate(rows_BT.chunk(pieces))))
        while missing := self._missing(pieces):
            self.redone += len(missing)
            await asyncio.gather(*(self._back(stage, index) for stage, index in missing))
        self._collect(pieces)
        return sum(losses)

    def leave(self, name: str) -> None:
        """A peer goes without a word, and with it what it has gathered."""
        peer = self._by_name[name]
        peer.there = False
        peer.gathered.clear()

    async def rebalance(self, rule: Rebalance | None = None) -> None:
        """Let peers move between the stages until nobody wants to; a mover fetches its new blocks."""
        rule = rule or Rebalance()
        while True:
            crew = [[peer for peer in self.peers if peer.there and peer.stage == s] for s in range(len(self.wiring))]
            moves = rule.decide(Crew(tuple(tuple(1 / peer.seconds for peer in held) for held in crew)))
            if not moves:
                return
            stage, place, to = moves[0]
            peer = crew[stage][place]
            self.wiring[stage].leave(peer.name)
            await asyncio.sleep(self.fetch)
            peer.stage = to
            self.wiring[to].join(peer.name, peer.seconds)
            self.moves += 1

    async def _through(self, index: int, piece: Tensor, count: int) -> float:
        cut = self.stages.cut
        hidden = embedded = cut.embed(piece)
        entered = []
        for stage in range(len(self.wiring)):
            entered.append(hidden.detach())

            def forward(peer: Peer, stage: int = stage, held: Tensor = entered[-1]) -> Tensor:
                return self._forward(stage, held)

            hidden = await self._ask(stage, 1.0, forward)
            if stage < len(self.stages.links):
                hidden = self.stages.crossed(stage, "forward", hidden)
        loss, gradient = self.stages.ends(hidden, piece, count)
        for stage in reversed(range(len(self.wiring))):
            if stage < len(self.stages.links):
                gradient = self.stages.crossed(stage, "backward", gradient)
            self._kept[stage, index] = entered[stage], gradient
            gradient = await self._back(stage, index)
        embedded.backward(gradient)  # type: ignore[no-untyped-call]
        return loss

    def _forward(self, stage: int, hidden: Tensor) -> Tensor:
        segment = self.stages.segments[stage]
        with torch.no_grad():
            return segment.cut.run(hidden, segment.first, segment.last)

    async def _back(self, stage: int, index: int) -> Tensor:
        entered, gradient = self._kept[stage, index]
        segment = self.stages.segments[stage]

        def compute(peer: Peer) -> Tensor:
            hidden = entered.clone().requires_grad_()
            out = segment.cut.run(hidden, segment.first, segment.last)
            found = torch.autograd.grad(out, [hidden, *segment.trainable()], gradient)
            peer.gathered[index] = list(found[1:])
            return found[0]

        return await self._ask(stage, BACK, compute)

    async def _ask(self, stage: int, share: float, compute: Callable[[Peer], Tensor]) -> Tensor:
        loop, wiring = asyncio.get_running_loop(), self.wiring[stage]
        while True:
            peer = self._by_name[wiring.choose()]
            try:
                async with peer.lock:
                    if not peer.there or peer.stage != stage:
                        raise Gone
                    began = loop.time()
                    await asyncio.sleep(share * peer.seconds)
                    if not peer.there:
                        raise Gone
                    peer.served += 1
                    wiring.observed(peer.name, (loop.time() - began) / share)
                    return compute(peer)
            except Gone:
                wiring.leave(peer.name)

    def _missing(self, pieces: int) -> list[tuple[int, int]]:
        """Stages and micro-batches whose gradients nobody holds."""
        found = []
        for stage in range(len(self.wiring)):
            held = {index for peer in self.peers if peer.stage == stage for index in peer.gathered}
            found += [(stage, index) for index in range(pieces) if index not in held]
        return found

    def _collect(self, pieces: int) -> None:
        """Peers of a stage add up their gradients, in the order of the micro-batches, and forget them."""
        for stage, segment in enumerate(self.stages.segments):
            held: dict[int, list[Tensor]] = {}
            for peer in self.peers:
                if peer.stage == stage:
                    held |= peer.gathered
            for index in range(pieces):
                for weight, gradient in zip(segment.trainable(), held[index], strict=True):
                    weight.grad = gradient if weight.grad is None else weight.grad + gradient
        for peer in self.peers:
            peer.gathered.clear()
