"""What each arm's final models score on every party's held-out examples.

In a real federation a party sees only its own held-out examples, and the delivery of the final model measures those.
A comparison also asks how a party's lonely model does on the others' examples, which only a simulation may ask.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean

from mycel.engines.inprocess import Labour
from mycel.errors import EngineError
from mycel.evaluate.metrics import Scores
from mycel.rounds.simulation import Finished
from mycel.rounds.system import State
from mycel.wire.parcel import Parcel


@dataclass
class Probes:
    """Scores by arm, by the node whose model it is, by the party whose held-out examples they are."""

    scores: dict[str, dict[int, list[Scores]]] = field(default_factory=dict)

    def mixture(self, name: str) -> float:
        """Mean, over an arm's models, of the loss on all parties' held-out examples together."""
        return fmean(sum(scores, Scores()).loss for scores in self.scores[name].values())

    def own(self, name: str) -> dict[int, Scores]:
        """Scores of each party's model on its own held-out examples; one model for all counts as everyone's."""
        found = self.scores[name]
        return {party: found.get(party, found[0])[party] for party in range(len(found[0]))}


def probe_all(finished: Mapping[str, Finished], labour: Labour) -> Probes:
    """Score the final model of every node of every arm, and the system's starting point, on every party's examples."""
    parties = len(finished["system"].world.site.store.names)
    frames: dict[tuple[str, int], tuple[str, int, bytes, bytes]] = {}
    for name, arm in finished.items():
        for node in range(len(arm.world.nodes)):
            home = arm.homes.get(node, b"")
            frames[name, node] = (arm.arm, node, _frame(arm, arm.state, node, parties), home)
    start = finished["system"]
    frames["base", 0] = (start.arm, 0, _frame(start, start.system.begin(start.world), 0, parties), b"")
    replies = asyncio.run(_ask(list(frames.values()), labour))
    probes = Probes()
    for (name, node), scores in zip(frames, replies, strict=True):
        probes.scores.setdefault(name, {})[node] = scores
    return probes


def _frame(arm: Finished, state: State, node: int, parties: int) -> bytes:
    brief = arm.system.brief(state, node)
    header = {**brief.header, "version": arm.progress.version, "holders": list(range(parties))}
    return Parcel("deliver", header, brief.tensors).to_bytes()


async def _ask(requests: list[tuple[str, int, bytes, bytes]], labour: Labour) -> list[list[Scores]]:
    """Put each distinct question once: nodes of a shared state that keep nothing at home have the same model."""
    asked: dict[str, asyncio.Future[list[Scores]]] = {}

    async def one(arm: str, node: int, frame: bytes, home: bytes) -> list[Scores]:
        reply = await labour.submit(arm, node, frame, home)
        if reply.refusal:
            raise EngineError(f"the final model of node {node} in the arm {arm!r} cannot be scored: {reply.refusal}")
        numbers = Parcel.from_bytes(reply.frame).header["scores"]
        return [Scores(*numbers[start : start + 3]) for start in range(0, len(numbers), 3)]

    keys = [
        hashlib.sha256(frame).hexdigest() + hashlib.sha256(home).hexdigest() + arm for arm, _, frame, home in requests
    ]
    for key, request in zip(keys, requests, strict=True):
        if key not in asked:
            asked[key] = asyncio.ensure_future(one(*request))
    return [await asked[key] for key in keys]
