"""The one loop of the rounds kind: ask, wait, check, combine, step - on every engine, at every pace.

``cohort -> brief -> local work -> encode -> guard -> collect -> filter -> combine -> server step -> evaluate``
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mycel.engines.engine import Arrival, Engine
from mycel.errors import EngineError, ParcelError
from mycel.rounds.checking import check_answer, check_reports, check_shapes
from mycel.rounds.guarding import Guarding
from mycel.rounds.leases import Lease, Leases
from mycel.rounds.pace import Pace, View
from mycel.rounds.pieces import goes_in_pieces, step_in_pieces, waits_in_a_file
from mycel.rounds.progress import Progress, Record
from mycel.rounds.sealing import is_letter
from mycel.rounds.site import limits
from mycel.rounds.system import Answer, State, System
from mycel.rounds.world import World
from mycel.wire.algebra import discount, group
from mycel.wire.parcel import Parcel
from mycel.wire.shelf import Frame, Shelf
from mycel.wire.waiting import Shelved, Waiting

ATTEMPTS = 8  # at a round whose sum cannot be opened, one after another


@dataclass
class Coordinator:
    """Drives one arm of a run.

    Parameters
    ----------
    checkpoint : callable
        Called after every round, when ``progress`` and ``leases`` are consistent; ``latest`` holds the answers that
        made the round, until it returns.
    shelf : Shelf
        Where answers wait to be combined.
    wiretap : callable, optional
        Sees every frame that crosses: ``(direction, node, kind, frame)``.
    """

    world: World
    system: System
    engine: Engine
    pace: Pace
    record: Record
    checkpoint: Callable[[Coordinator], None] = lambda _: None
    progress: Progress = field(default_factory=Progress)
    latest: list[Answer] = field(default_factory=list)
    shelf: Shelf = field(default_factory=Shelf)
    wiretap: Callable[[str, int, str, Frame], None] | None = None
    _arrived: dict[int, Answer] = field(default_factory=dict)
    _letters: dict[int, Parcel] = field(default_factory=dict)
    _present: tuple[int, ...] | None = None
    _attempts: int = 0
    _refused: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.guarding = Guarding(self.world, self.system)
        self.leases = Leases(
            self.world, self.system, self.engine, self.record, self.progress, wiretap=self.wiretap, shelf=self.shelf
        )
        self._in_pieces = goes_in_pieces(self.world.recipe, self.system)

    async def run(self) -> State:
        """Run every round that is left, deliver the result to every node, and return the final state."""
        done = self.progress
        if not done.started:
            done.state, done.started = self.system.begin(self.world), True
            self.checkpoint(self)
        try:
            while done.version < self.world.recipe.rounds.count:
                await self._advance()
        finally:
            self.guarding.release()
        if not done.delivered:
            await self._deliver()
        return done.state

    async def _advance(self) -> None:
        if self.guarding.hides and self._present is None and not await self._prepare():
            return
        view = self._view()
        if not view.cohort:  # a draw of nobody is a round all the same: its noise is released
            await self._combine()
            return
        for node in self.pace.ask(view):
            self._ask(node, self._brief(node))
        if not self.leases.held:
            raise EngineError(self._stalled())
        arrival = await self.engine.answer(self.leases.next_deadline(self.pace.keeps))
        if arrival is not None:
            self._collect(arrival)
        if self.pace.ready(self._view()):
            await self._combine()
        elif arrival is None and (self.leases.overdue or self.pace.keeps):  # what has come meanwhile is taken first
            self.leases.expire()

    def _view(self) -> View:
        return View(
            self.progress.version,
            self._cohort(),
            tuple(self.leases.held),
            tuple(self._arrived),
            tuple(self._refused),
            self.leases.overdue,
        )

    async def _prepare(self) -> bool:
        """Let the hiding guard exchange its messages; return whether enough parties are left to go on."""
        cohort = self._cohort()
        if not cohort:
            return True
        try:
            self._present = tuple(await self.guarding.prepare(self._exchange, cohort, self.progress.state))
        except ParcelError as error:
            self._abandon(str(error))
            return False
        self._refused.clear()  # who left before is no part of this cohort
        return True

    async def _exchange(self, briefs: Mapping[int, Parcel]) -> dict[int, Parcel]:
        """Send each node one of the guard's messages and return the answers that come before their deadlines."""
        self._letters = {}
        for node, brief in briefs.items():
            self._ask(node, brief)
        while self.leases.held:
            arrival = await self.engine.answer(self.leases.next_deadline())
            if arrival is None:
                self.leases.expire()
            else:
                self._collect(arrival)
        return self._letters

    def _abandon(self, why: str) -> None:
        """Give up an attempt at a round: whatever arrived for it is dropped, and it is begun anew."""
        self.leases.held.clear()
        self._arrived.clear()
        self._refused.clear()
        self._present = None
        self._attempts += 1
        self.leases.drop(-1, "abandoned", why, self.engine.now())
        if self._attempts >= ATTEMPTS:
            raise EngineError(
                f"round {self.progress.version + 1} was abandoned {ATTEMPTS} times, last because {why}: ask more "
                "parties (rounds.cohort), or let fewer be enough (guard.staying, above 0.5)"
            )

    def _cohort(self) -> tuple[int, ...]:
        if self._present is not None:
            return self._present
        drawn = self.guarding.cohort(self.progress.version)
        if drawn is not None:
            return drawn
        nodes = list(range(len(self.world.nodes)))
        share = self.world.recipe.rounds.cohort
        if share >= 1:
            return tuple(nodes)
        size = max(1, round(share * len(nodes)))
        return tuple(sorted(random.Random(self.world.seed("cohort", self.progress.version)).sample(nodes, size)))

    def _brief(self, node: int) -> Parcel:
        state = self.progress.state
        brief = self.system.abridge(self.system.brief(state, node), state, node)
        every = self.world.recipe.rounds.evaluate_every
        header = {**brief.header, "version": self.progress.version}
        if self.progress.version % every == 0:
            header["evaluate"] = 1
        told = self.guarding.terms()
        return Parcel(brief.kind, header | ({"guard": told} if told else {}), brief.tensors)

    def _ask(self, node: int, brief: Parcel) -> None:
        if brief.kind == "work":
            self.guarding.count(node)
        self.leases.grant(node, brief)

    def _collect(self, arrival: Arrival) -> None:
        lease = self.leases.settle(arrival)
        if lease is None:
            return
        try:
            if arrival.left:
                self._refused[arrival.node] += 1
            elif is_letter(lease.kind):
                self._letters[arrival.node] = self.leases.open(arrival)
            else:
                self._accept(arrival, lease)
        except ParcelError as error:
            self._refused[arrival.node] += 1
            self.leases.drop(arrival.node, "invalid", str(error), arrival.at, len(arrival.frame))

    def _accept(self, arrival: Arrival, lease: Lease) -> None:
        answer, loss = self._filter(arrival, lease)
        if lease.kind == "work":
            self._arrived[arrival.node] = answer
        self.record(
            "answer",
            round=lease.version,
            node=arrival.node,
            bytes=len(arrival.frame),
            at=arrival.at,
            started=arrival.started,
            computed=arrival.computed,
            staleness=answer.staleness,
            loss=loss,
        )

    def _filter(self, arrival: Arrival, lease: Lease) -> tuple[Answer, Any]:
        """Return the answer, once it is found sound, and the loss it reports."""
        rounds, bounds = self.world.recipe.rounds, limits(self.world.recipe.wire, self.world.base)
        kept = self.shelf.keep(arrival.frame)
        parcel: Parcel | Waiting
        if self._in_pieces and kept.path is not None and lease.kind == "work":
            parcel = Waiting.of(kept, bounds)
            check_answer(self.system, parcel)
            check_shapes(parcel.tensors.under("update/"), lease.expects or {})
        else:
            parcel = self.leases.open(arrival)
            self._inspect(parcel, arrival.node, lease)
        check_reports(self.system, parcel.header, lease.kind == "work")
        if "scores" in parcel.header:
            self.progress.scores.setdefault(lease.version, {})[arrival.node] = parcel.header["scores"]
        staleness = self.progress.version - lease.version
        samples = int(parcel.header.get("samples", 0))
        weight = samples * discount(staleness, rounds.staleness)
        return Answer(arrival.node, Shelved(kept, bounds), samples, staleness, weight), parcel.header.get("loss")

    def _inspect(self, parcel: Parcel, node: int, lease: Lease) -> None:
        """Refuse an answer that is not what was asked for."""
        hidden = self.guarding.current if lease.kind == "work" else None
        check_answer(self.system, parcel, sealed=hidden is not None)
        if hidden is not None:
            hidden.check(node, parcel)
        elif lease.expects is not None:
            check_shapes(group(parcel.tensors, "update"), lease.expects)
        if lease.kind == "work":
            self.system.inspect(self.progress.state, node, parcel)

    async def _combine(self) -> None:
        done = self.progress
        if not self.pace.keeps:
            self.leases.expire()
            self.leases.held.clear()
        self.latest = [self._arrived[node] for node in sorted(self._arrived)]
        try:
            answers = await self.guarding.open(self._exchange, self.latest, done.state)
        except ParcelError as error:
            self._abandon(str(error))
            return
        if answers and self._in_pieces and any(map(waits_in_a_file, answers)):
            self.leases.forget()
            done.state = step_in_pieces(self.system, done.state, answers)
        elif answers:
            done.state = self.system.step(done.state, self.system.combine(done.state, answers))
        done.version += 1
        self._present, self._attempts = None, 0
        self.guarding.release()
        meter = self.leases.meter
        entry = done.close_round(len(self.latest), meter.total("up"), meter.total("down"), self.engine.now())
        self.record("round", **entry)
        self._arrived.clear()
        self._refused.clear()
        self.checkpoint(self)
        self.latest = []

    async def _deliver(self) -> None:
        """Hand the final state to every node; each scores it on its own held-out examples.

        No round comes after this one: who stays silent is asked once more, with twice the time, before it goes without.
        """
        self.leases.held.clear()
        self.guarding.release()
        for node in range(len(self.world.nodes)):
            self._hand_over(node)
        asked_again = set[int]()
        while self.leases.held:
            arrival = await self.engine.answer(self.leases.next_deadline())
            if arrival is not None:
                self._collect(arrival)
                continue
            for node in sorted(set(self.leases.expire()) - asked_again):
                asked_again.add(node)
                self._hand_over(node)
        self.progress.delivered = True
        self.checkpoint(self)

    def _hand_over(self, node: int) -> None:
        brief = self._brief(node)
        self._ask(node, Parcel("deliver", {**brief.header, "evaluate": 1}, brief.tensors))

    def _stalled(self) -> str:
        return (
            f"round {self.progress.version + 1} cannot go on: {len(self._refused)} of {len(self._cohort())} answers "
            "were refused or lost and nobody is left to ask; the log's drop events say why, and `--resume` goes on "
            "from the last round"
        )
