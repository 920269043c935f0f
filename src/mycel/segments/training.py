"""Training through a chain of peers: states go forward over the cuts, gradients come back over them.

The owner holds embedding, head, labels and what is tuned; so states cross at both ends of the chain and neither the
tokens nor their labels leave (the U-shaped form of split learning). Peers' weights stay as they are.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

from torch import Tensor

from mycel.decisions.routing import Leg
from mycel.engines.calls import PeerLost, PeerRefused
from mycel.errors import EngineError, ParcelError
from mycel.segments.boundary import Boundary, sound
from mycel.segments.client import SwarmModel

MOST_ATTEMPTS = 8


@dataclass
class _Stage:
    leg: Leg
    entered: Tensor
    session: str


class Chain:
    """One batch on its way through the peers and back.

    Parameters
    ----------
    model : SwarmModel
        The model whose blocks the peers hold.
    """

    def __init__(self, model: SwarmModel) -> None:
        self.model = model
        self._stages: list[_Stage] = []

    async def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Return the state behind the last block; what entered each stage is kept, in case a peer is lost."""
        self._stages = []
        depth = self.model.cut.depth
        for leg in await self.model.directory.route(0, depth, self.model.patience):
            hidden_BTD = await self._through(leg, hidden_BTD.detach())
        return hidden_BTD

    async def backward(self, gradient_BTD: Tensor) -> Tensor:
        """Return the gradient before block 0, of the gradient behind the last block."""
        while self._stages:
            stage = self._stages.pop()
            began = asyncio.get_running_loop().time()
            try:
                gradient_BTD = await self._ask("backward", stage, gradient_BTD, "gradient")
            except (PeerLost, PeerRefused, ParcelError) as error:
                self._blame("backward", stage.leg.peer, error, asyncio.get_running_loop().time() - began)
                # Whoever takes the place computes the lost forward again from what entered here.
                for leg in await self._others(stage.leg):
                    stage.entered = await self._through(leg, stage.entered)
        return gradient_BTD

    async def _through(self, leg: Leg, hidden_BTD: Tensor) -> Tensor:
        waiting, attempts = [leg], 0
        while waiting:
            stage = _Stage(waiting.pop(0), hidden_BTD, os.urandom(16).hex())
            began = asyncio.get_running_loop().time()
            try:
                hidden_BTD = await self._ask("forward", stage, hidden_BTD, "hidden")
                self._stages.append(stage)
            except (PeerLost, PeerRefused, ParcelError) as error:
                attempts += 1
                if attempts > MOST_ATTEMPTS:
                    raise EngineError(f"{attempts} peers failed in one pass, last: {error}") from error
                self._blame("forward", stage.leg.peer, error, asyncio.get_running_loop().time() - began)
                waiting = [*await self._others(stage.leg), *waiting]
        return hidden_BTD

    async def _ask(self, verb: str, stage: _Stage, tensor: Tensor, answer: str) -> Tensor:
        model, leg = self.model, stage.leg
        header = {"first": leg.first, "last": leg.last, "model": model.model, "session": stage.session}
        name = "hidden" if verb == "forward" else "gradient"
        frame = model.boundary.pack(verb, {**header, "shape": list(tensor.shape[:2])}, **{name: tensor.detach()})
        known, work = model.directory.training[leg.peer, verb], tensor.shape[:2].numel()
        loop = asyncio.get_running_loop()
        started = loop.time()
        found = await model.peers.call(leg.peer, verb, frame, known.allowance(work, model.patience))
        state = sound(Boundary.unpack(found, (answer,)), answer, tuple(tensor.shape))
        known.learn(work, loop.time() - started)
        if not model.directory.training[leg.peer, "backward"].strikes:  # who fails each way back fails in a row
            model.directory.known[leg.peer].strikes = 0
        return state

    async def _others(self, leg: Leg) -> tuple[Leg, ...]:
        return await self.model.directory.route(leg.first, leg.last, self.model.patience, avoid=leg.peer)

    def _blame(self, verb: str, peer: str, error: Exception, waited: float) -> None:
        if isinstance(error, ParcelError):
            self.model.directory.training[peer, verb].lied(0.0, self.model.patience)
            self.model.directory.lied(peer, self.model.patience)
        else:
            self.model.directory.training[peer, verb].late(0.0, waited, self.model.patience)  # for its next deadline
            self.model.directory.late(peer, waited, self.model.patience)
