"""The one loop of the rounds kind: ask, wait, check, combine, step - on every engine, at every pace.

``cohort -> brief -> local work -> encode -> guard -> collect -> filter -> combine -> server step -> evaluate``
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mycel.engines.engine import Arrival, Engine, Request
from mycel.errors import EngineError, ParcelError
from mycel.evaluate.metrics import Scores
from mycel.rounds.algebra import discount
from mycel.rounds.deadline import Deadlines
from mycel.rounds.guarding import Guarding
from mycel.rounds.pace import Pace, View
from mycel.rounds.sealing import is_letter
from mycel.rounds.site import limits
from mycel.rounds.system import Answer, Shelved, State, System, check_answer, check_shapes, group
from mycel.rounds.world import World
from mycel.wire.codecs import parse_codec
from mycel.wire.meter import Meter
from mycel.wire.parcel import Parcel
from mycel.wire.shelf import Shelf

ATTEMPTS = 8  # at a round whose sum cannot be opened, one after another


class Record(Protocol):
    """Writes one event of the run's log."""

    def __call__(self, event: str, **fields: Any) -> None:
        """Append the event."""


@dataclass
class Lease:
    """A node's permission to answer: who was asked what, when, and until when an answer is expected."""

    request: Request
    version: int
    kind: str
    expects: dict[str, tuple[int, ...]] | None
    deadline: float | None


@dataclass
class Progress:
    """Everything the coordinator must remember between two rounds; a checkpoint holds exactly this."""

    state: State = field(default_factory=State)
    version: int = 0
    generation: int = 0
    started: bool = False
    delivered: bool = False
    scores: dict[int, dict[int, list[float]]] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)
    busy: dict[int, float] = field(default_factory=dict)  # until when nodes that work ahead are at it


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
    meter: Meter = field(default_factory=Meter)
    leases: dict[int, Lease] = field(default_factory=dict)
    deadlines: Deadlines = field(default_factory=Deadlines)
    latest: list[Answer] = field(default_factory=list)
    shelf: Shelf = field(default_factory=Shelf)
    wiretap: Callable[[str, int, str, bytes], None] | None = None
    _arrived: dict[int, Answer] = field(default_factory=dict)
    _letters: dict[int, Parcel] = field(default_factory=dict)
    _present: tuple[int, ...] | None = None
    _attempts: int = 0
    _brief_sent: tuple[Parcel, bytes] | None = None
    _refused: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.guarding = Guarding(self.world, self.system)

    async def run(self) -> State:
        """Run every round that is left, deliver the result to every node, and return the final state."""
        done = self.progress
        if not done.started:
            done.state, done.started = self.system.begin(self.world), True
            self.checkpoint(self)
        while done.version < self.world.recipe.rounds.count:
            await self._advance()
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
        if not self.leases:
            raise EngineError(self._stalled())
        arrival = await self.engine.answer(self._next_deadline())
        if arrival is not None:
            self._collect(arrival)
        if self.pace.ready(self._view()):
            await self._combine()
        elif self._overdue or (arrival is None and self.pace.keeps):
            self._expire()

    @property
    def _overdue(self) -> bool:
        now = self.engine.now()
        return bool(self.leases) and all(
            lease.deadline is not None and lease.deadline <= now for lease in self.leases.values()
        )

    def _next_deadline(self) -> float | None:
        now = self.engine.now()
        moments = [lease.deadline for lease in self.leases.values() if lease.deadline is not None]
        return min((moment for moment in moments if moment > now), default=None)

    def _view(self) -> View:
        return View(
            self.progress.version,
            self._cohort(),
            tuple(self.leases),
            tuple(self._arrived),
            tuple(self._refused),
            self._overdue,
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
        while self.leases:
            arrival = await self.engine.answer(self._next_deadline())
            if arrival is None:
                self._expire()
            else:
                self._collect(arrival)
        return self._letters

    def _abandon(self, why: str) -> None:
        """Give up an attempt at a round: whatever arrived for it is dropped, and it is begun anew."""
        self.leases.clear()
        self._arrived.clear()
        self._refused.clear()
        self._present = None
        self._attempts += 1
        self._drop(-1, "abandoned", why, self.engine.now())
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
        frame = self._serialise(brief)
        steps = int(brief.header.get("steps", self.world.recipe.rounds.local_steps)) if brief.kind == "work" else 0
        seconds = self.world.compute_seconds(node, steps, int("evaluate" in brief.header))
        self.progress.generation += 1
        ready = self.progress.busy.get(node, 0.0) if self.system.ahead and brief.kind == "work" else None
        request = Request(node, self.progress.generation, frame, self.engine.now(), seconds, ready)
        self.meter.count(node, "down", "guard" if is_letter(brief) else brief.kind, len(frame))
        self._tap("down", node, brief.kind, frame)
        if brief.kind == "work":
            self.guarding.count(node)
        self.record("ask", round=self.progress.version, node=node, bytes=len(frame), at=request.asked)
        deadline = self.deadlines.of(request, self.engine, self.world.recipe.rounds.patience)
        expects = self.system.expects(brief) if brief.kind == "work" else None
        self.leases[node] = Lease(request, self.progress.version, brief.kind, expects, deadline)
        self.engine.ask(request)

    def _serialise(self, brief: Parcel) -> bytes:
        """Encode a brief; nodes that are told the same share one frame, or a thousand would fill the memory."""
        if self._brief_sent is None or not _same(self._brief_sent[0], brief):
            self._brief_sent = brief, brief.to_bytes(parse_codec(self.world.recipe.wire.brief_codec))
        return self._brief_sent[1]

    def _collect(self, arrival: Arrival) -> None:
        lease, size = self.leases.get(arrival.node), len(arrival.frame)
        if lease is None or lease.request.generation != arrival.generation:
            if not arrival.left:
                self.meter.count(arrival.node, "up", "late", size)
                self._drop(arrival.node, "late", "answer of an ended lease", arrival.at, size)
            return
        if arrival.left:
            del self.leases[arrival.node]
            self._refused[arrival.node] += 1
            self._drop(arrival.node, "lost", arrival.refusal, arrival.at)
            return
        letter = is_letter(Parcel(lease.kind))
        self.meter.count(arrival.node, "up", "guard" if letter else lease.kind, size)
        if self.wiretap is not None:
            self._tap("up", arrival.node, lease.kind, bytes(arrival.frame))
        del self.leases[arrival.node]
        if lease.request.ready is not None:
            self.progress.busy[arrival.node] = arrival.computed + lease.request.seconds
        if not letter:  # how soon keys come says nothing of how long work takes
            self.deadlines.learn(arrival)
        self._bound()
        try:
            if letter:
                self._letters[arrival.node] = self._open_frame(arrival)
                return
            answer, loss = self._filter(arrival, lease)
        except ParcelError as error:
            self._refused[arrival.node] += 1
            self._drop(arrival.node, "invalid", str(error), arrival.at, size)
            return
        if lease.kind == "work":
            self._arrived[arrival.node] = answer
        self.record(
            "answer",
            round=lease.version,
            node=arrival.node,
            bytes=size,
            at=arrival.at,
            started=arrival.started,
            computed=arrival.computed,
            staleness=answer.staleness,
            loss=loss,
        )

    def _bound(self) -> None:
        """Set a deadline for whoever was asked when nothing was known yet of how long an answer takes."""
        for lease in self.leases.values():
            if lease.deadline is None:
                lease.deadline = self.deadlines.of(lease.request, self.engine, self.world.recipe.rounds.patience)

    def _filter(self, arrival: Arrival, lease: Lease) -> tuple[Answer, Any]:
        """Return the answer, once it is found sound, and the loss it reports."""
        rounds, bounds = self.world.recipe.rounds, limits(self.world.recipe.wire, self.world.base)
        parcel = self._open_frame(arrival)
        hidden = self.guarding.current if lease.kind == "work" else None
        check_answer(self.system, parcel, sealed=hidden is not None)
        if hidden is not None:
            hidden.check(arrival.node, parcel)
        elif lease.expects is not None:
            check_shapes(group(parcel.tensors, "update"), lease.expects)
        if lease.kind == "work":
            self.system.inspect(self.progress.state, arrival.node, parcel)
        scores = parcel.header.get("scores")
        if scores is not None:
            if not isinstance(scores, list) or len(scores) != 3:
                raise ParcelError(f"the report 'scores' is {str(scores)[:40]!r}; loss, tokens and hits are needed")
            self.progress.scores.setdefault(lease.version, {})[arrival.node] = scores
        staleness = self.progress.version - lease.version
        samples = int(parcel.header.get("samples", 0))
        weight = samples * discount(staleness, rounds.staleness)
        sent = Shelved(self.shelf.keep(arrival.frame), bounds)
        return Answer(arrival.node, sent, samples, staleness, weight), parcel.header.get("loss")

    def _open_frame(self, arrival: Arrival) -> Parcel:
        if arrival.refusal:
            raise ParcelError(arrival.refusal)
        return Parcel.from_bytes(bytes(arrival.frame), limits(self.world.recipe.wire, self.world.base))

    def _tap(self, direction: str, node: int, kind: str, frame: bytes) -> None:
        if self.wiretap is not None:
            self.wiretap(direction, node, kind, frame)

    async def _combine(self) -> None:
        done = self.progress
        if not self.pace.keeps:
            self._expire()
            self.leases.clear()
        self.latest = [self._arrived[node] for node in sorted(self._arrived)]
        try:
            answers = await self.guarding.open(self._exchange, self.latest, done.state)
        except ParcelError as error:
            self._abandon(str(error))
            return
        if answers:
            done.state = self.system.step(done.state, self.system.combine(done.state, answers))
        done.version += 1
        self._present, self.guarding.current, self._attempts = None, None, 0
        self._close_round(len(self.latest))
        self._arrived.clear()
        self._refused.clear()
        self.checkpoint(self)
        self.latest = []

    def _close_round(self, answers: int) -> None:
        done = self.progress
        before = done.rounds[-1] if done.rounds else {"total_up": 0, "total_down": 0}
        up, down = self.meter.total("up"), self.meter.total("down")
        entry = {
            "round": done.version,
            "loss": None,
            "bytes_up": up - before["total_up"],
            "bytes_down": down - before["total_down"],
            "virtual_seconds": self.engine.now(),
            "answers": answers,
            "dropped": sum(done.drops.values()),
            "total_up": up,
            "total_down": down,
        }
        done.rounds.append(entry)
        seen = {key: value for key, value in entry.items() if key not in {"loss", "total_up", "total_down"}}
        self.record("round", **seen, loss_before=self.loss(done.version - 1))

    async def _deliver(self) -> None:
        """Hand the final state to every node; each scores it on its own held-out examples."""
        waiting = set(range(len(self.world.nodes)))
        self.leases.clear()
        self.guarding.current = None
        for node in sorted(waiting):
            brief = self._brief(node)
            self._ask(node, Parcel("deliver", {**brief.header, "evaluate": 1}, brief.tensors))
        while self.leases:
            arrival = await self.engine.answer(self._next_deadline())
            if arrival is None:
                self._expire()
            else:
                self._collect(arrival)
        self.progress.delivered = True
        self.checkpoint(self)

    def _expire(self) -> None:
        """End the leases of nodes that stayed silent past their deadline; they may be asked anew."""
        for node, lease in list(self.leases.items()):
            if lease.deadline is not None and lease.deadline <= self.engine.now():
                del self.leases[node]
                self.deadlines.lost(node)
                self._drop(node, "lost", "no answer by the learnt deadline", self.engine.now())

    def _drop(self, node: int, reason: str, detail: str, at: float, size: int = 0) -> None:
        self.progress.drops[reason] += 1
        self.record("drop", round=self.progress.version, node=node, reason=reason, detail=detail, bytes=size, at=at)

    def _stalled(self) -> str:
        return (
            f"round {self.progress.version + 1} cannot go on: {len(self._refused)} of {len(self._cohort())} answers "
            "were refused and nobody is left to ask; the log's drop events say why"
        )

    def loss(self, version: int) -> float | None:
        """Mean held-out loss of the state of ``version`` over the parties that scored it; None if none did."""
        found = self.progress.scores.get(version)
        return sum(read_scores(found).values(), Scores()).loss if found else None


def _same(one: Parcel, other: Parcel) -> bool:
    """Whether two parcels are made of the very same tensors and say the same."""
    return (
        one.kind == other.kind
        and one.header == other.header
        and one.tensors.keys() == other.tensors.keys()
        and all(tensor is other.tensors[name] for name, tensor in one.tensors.items())
    )


def read_scores(found: Mapping[int, Sequence[float]]) -> dict[int, Scores]:
    """Return each node's scores from the three numbers it reported."""
    return {node: Scores(float(loss), int(tokens), int(correct)) for node, (loss, tokens, correct) in found.items()}
