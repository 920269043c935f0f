"""Federations of three numbers: parties that pull a vector towards targets of their own, over the real machinery.

Every round has a closed form; worlds, parcels, engine, clock and coordinator are the real ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mycel.engines.inprocess import InProcessEngine
from mycel.engines.pool import Inline
from mycel.finetune.fedavg import FedAvg
from mycel.fleet import Fleet, load_fleet, run_virtual
from mycel.rounds.coordinator import Coordinator
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.pace import parse_pace
from mycel.rounds.system import Answer, Outcome, State
from mycel.rounds.world import World
from mycel.wire.algebra import group, with_role
from mycel.wire.parcel import Parcel, Tensors

Change = Callable[[int, Parcel], Parcel | bytes]


class Pull(FedAvg):
    """Averages what parties pull a vector of three numbers by."""

    def begin(self, world: World) -> State:
        self.seen: list[list[Answer]] = []
        return State(shared={"w": torch.zeros(3)})

    def cut(self, shared: Tensors, node: int) -> Tensors:
        return shared

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        self.seen.append(list(answers))
        return super().combine(state, answers)


class Bulky(Pull):
    """Takes answers of any names and shapes, which may be far longer than what was asked."""

    def expects(self, brief: Parcel) -> None:
        return None

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        return super().combine(state, [replace(answer, sent=_slim(answer)) for answer in answers])


def _slim(answer: Answer) -> Parcel:
    return Parcel("answer", answer.parcel.header, {"update/w": answer.tensors()["w"]})


def target(node: int) -> torch.Tensor:
    return torch.tensor([1.0, float(node), float(node % 2)])


@dataclass
class Parties:
    """Hosts the parties: each halves its distance to its target, and ``change`` may spoil what it sends."""

    change: Change = lambda node, answer: answer
    briefs: Counter[int] = field(default_factory=Counter)

    def open(self, arm: str, job: str) -> None:
        """Need nothing."""

    def handle(self, arm: str, node: int, frame: bytes, home: bytes) -> tuple[bytes, bytes]:
        brief = Parcel.from_bytes(frame)
        self.briefs[node] += 1
        header: dict[str, Any] = {"samples": node + 1}
        if brief.header.get("evaluate"):
            header["scores"] = [2.0 * (node + 1), node + 1, 0]
        if brief.kind == "deliver":
            return Parcel("answer", header).to_bytes(), b""
        update = {"w": (target(node) - group(brief.tensors, "shared")["w"]) / 2}
        answer = self.change(node, Parcel("answer", {**header, "loss": 1.0}, with_role("update", update)))
        return answer if isinstance(answer, bytes) else answer.to_bytes(), b""

    def close(self) -> None:
        """Hold nothing."""


@dataclass
class Rig:
    """A coordinator over real parts, and what it wrote to its log."""

    coordinator: Coordinator
    system: Pull
    parties: Parties
    events: list[dict[str, Any]]

    def run(self) -> State:
        async def program() -> State:
            try:
                return await self.coordinator.run()
            finally:
                await self.coordinator.engine.close()

        return run_virtual(program())

    def of(self, kind: str, **wanted: Any) -> list[dict[str, Any]]:
        return [
            event for event in self.events if event["event"] == kind and all(event[k] == v for k, v in wanted.items())
        ]


def rig_over(lab: Laboratory) -> Callable[..., Rig]:
    """Return a maker of rigs: recipe changes, the system, the fleet, and what spoils answers."""

    def make(
        changes: dict[str, Any],
        kind: type[Pull] = Pull,
        fleet: Fleet | None = None,
        change: Change = lambda node, answer: answer,
    ) -> Rig:
        recipe = lab.recipe("fedavg", {"rounds.count": 3, "fleet.devices": "equal", **changes})
        world, parties, events = lab.world(recipe), Parties(change), list[dict[str, Any]]()
        world.fleet = fleet or load_fleet(recipe.fleet.devices)
        engine = InProcessEngine(world.fleet, Inline(lambda: parties), "arm", 1)
        system = kind(recipe)

        def record(event: str, **fields: Any) -> None:
            events.append({"event": event, **fields})

        pace = parse_pace(recipe.rounds.pace, recipe.rounds.quorum)
        return Rig(Coordinator(world, system, engine, pace, record), system, parties, events)

    return make


def closed_form(nodes: Sequence[Sequence[int]]) -> torch.Tensor:
    """Where the vector is after rounds in which these nodes answered, none of them stale."""
    state = torch.zeros(3)
    for answered in nodes:
        total = sum(node + 1 for node in answered)
        shares = [(node + 1) / total for node in answered]
        state = state + sum(
            (share * (target(node) - state) / 2 for node, share in zip(answered, shares, strict=True)), torch.zeros(3)
        )
    return state
