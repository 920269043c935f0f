"""Leases: who was asked what, and until when an answer is expected.

Every brief goes out and every answer comes in under a lease, so what crosses is metered and logged here, and so is
whatever is dropped: late, lost or unsound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mycel.engines.engine import Arrival, Engine, Request
from mycel.errors import MycelError, ParcelError
from mycel.rounds.deadline import Deadlines
from mycel.rounds.progress import Progress, Record
from mycel.rounds.sealing import is_letter
from mycel.rounds.site import limits
from mycel.rounds.system import System
from mycel.rounds.world import World
from mycel.wire.codecs import RAW, parse_codec
from mycel.wire.meter import Meter
from mycel.wire.parcel import Parcel
from mycel.wire.shelf import Frame, Shelf


@dataclass
class Lease:
    """A node's permission to answer: who was asked what, when, and until when an answer is expected."""

    request: Request
    version: int
    kind: str
    expects: dict[str, tuple[int, ...]] | None
    deadline: float | None


@dataclass
class Leases:
    """Grants leases, settles them, and ends those whose nodes stay silent.

    Parameters
    ----------
    progress : Progress
        The coordinator's; generations and drops are counted there.
    wiretap : callable, optional
        Sees every frame that crosses: ``(direction, node, kind, frame)``.
    shelf : Shelf
        Where briefs wait that are too large for memory.
    """

    world: World
    system: System
    engine: Engine
    record: Record
    progress: Progress
    meter: Meter = field(default_factory=Meter)
    held: dict[int, Lease] = field(default_factory=dict)
    deadlines: Deadlines = field(default_factory=Deadlines)
    wiretap: Callable[[str, int, str, Frame], None] | None = None
    shelf: Shelf = field(default_factory=Shelf)
    _sent: tuple[Parcel, Frame] | None = None

    def grant(self, node: int, brief: Parcel) -> None:
        """Send ``node`` a brief: it holds a lease from now on."""
        frame, works = self._serialise(brief), brief.kind == "work"
        steps = int(brief.header.get("steps", self.world.recipe.rounds.local_steps)) if works else 0
        seconds = self.world.compute_seconds(node, steps, int("evaluate" in brief.header))
        self.progress.generation += 1
        ready = self.progress.busy.get(node, 0.0) if self.system.ahead and works else None
        request = Request(node, self.progress.generation, frame, self.engine.now(), seconds, ready)
        self.meter.count(node, "down", _purpose(brief.kind), len(frame))
        self._tap("down", node, brief.kind, frame)
        self.record("ask", round=self.progress.version, node=node, bytes=len(frame), at=request.asked)
        expects = self.system.expects(brief) if works else None
        self.held[node] = Lease(request, self.progress.version, brief.kind, expects, self._deadline(request))
        self.engine.ask(request)

    def _serialise(self, brief: Parcel) -> Frame:
        """Encode a brief; nodes that are told the same share one frame, or a thousand would fill the memory."""
        if self._sent is None or not _same(self._sent[0], brief):
            codec = parse_codec(self.world.recipe.wire.brief_codec)
            large = codec is RAW and brief.size > self.shelf.budget
            self._sent = brief, self.shelf.file(brief.to_file, brief.size) if large else brief.to_bytes(codec)
        return self._sent[1]

    def forget(self) -> None:
        """Let go of the latest brief, whose tensors may be the state's."""
        self._sent = None

    def settle(self, arrival: Arrival) -> Lease | None:
        """End the lease that an arrival belongs to and return it; None for one that comes late or tells of a loss."""
        node, size, lease = arrival.node, len(arrival.frame), self.held.get(arrival.node)
        if lease is None or lease.request.generation != arrival.generation:
            if not arrival.left:
                self.meter.count(node, "up", "late", size)
                self.drop(node, "late", "answer of an ended lease", arrival.at, size)
            return None
        del self.held[node]
        if arrival.left:
            self.drop(node, "lost", arrival.refusal, arrival.at)
            return lease
        self.meter.count(node, "up", _purpose(lease.kind), size)
        self._tap("up", node, lease.kind, arrival.frame)
        if lease.request.ready is not None:
            self.progress.busy[node] = arrival.computed + lease.request.seconds
        if not is_letter(lease.kind):  # how soon keys come says nothing of how long work takes
            self.deadlines.learn(arrival)
        self._bound()
        return lease

    def open(self, arrival: Arrival) -> Parcel:
        """Decode what arrived; a refusal is as unsound as damage."""
        if arrival.refusal:
            raise ParcelError(arrival.refusal)
        return Parcel.from_bytes(bytes(arrival.frame), limits(self.world.recipe.wire, self.world.base))

    @property
    def overdue(self) -> bool:
        """Whether every lease is past its deadline."""
        now = self.engine.now()
        return bool(self.held) and all(
            lease.deadline is not None and lease.deadline <= now for lease in self.held.values()
        )

    def next_deadline(self, each: bool = True) -> float | None:
        """When the next lease comes to its deadline: now, if one has; None if nobody has a deadline.

        Without ``each`` a deadline that has passed counts only once all have, and whoever has none is waited for.
        """
        now = self.engine.now()
        moments = [lease.deadline for lease in self.held.values() if lease.deadline is not None]
        if each and moments:
            return max(min(moments), now)
        waits = len(moments) < len(self.held) or not moments
        return min((moment for moment in moments if moment > now), default=None if waits else now)

    def expire(self) -> list[int]:
        """End the leases of nodes that stayed silent past their deadline and return these; they may be asked anew."""
        now = self.engine.now()
        silent = [node for node, lease in self.held.items() if lease.deadline is not None and lease.deadline <= now]
        for node in silent:
            del self.held[node]
            self.deadlines.lost(node)
            self.drop(node, "lost", "no answer by the learnt deadline", now)
        return silent

    def drop(self, node: int, reason: str, detail: str, at: float, size: int = 0) -> None:
        """Count and log what is left out."""
        self.progress.drops[reason] += 1
        self.record("drop", round=self.progress.version, node=node, reason=reason, detail=detail, bytes=size, at=at)

    def _bound(self) -> None:
        """Set a deadline for whoever was asked when nothing was known yet of how long an answer takes."""
        for lease in self.held.values():
            if lease.deadline is None:
                lease.deadline = self._deadline(lease.request)

    def _deadline(self, request: Request) -> float | None:
        return self.deadlines.of(request, self.engine, self.world.recipe.rounds.patience)

    def _tap(self, direction: str, node: int, kind: str, frame: Frame) -> None:
        """Show a frame to whoever watches; an answer was checked by nobody yet, so that it may surprise them."""
        if self.wiretap is None:
            return
        try:
            self.wiretap(direction, node, kind, frame)
        except MycelError:  # what is the matter with the watcher itself, such as a full disk
            raise
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"[:200]
            self.record("unwatched", round=self.progress.version, node=node, kind=kind, detail=detail)


def _purpose(kind: str) -> str:
    return "guard" if is_letter(kind) else kind


def _same(one: Parcel, other: Parcel) -> bool:
    """Whether two parcels are made of the very same tensors and say the same."""
    return (
        one.kind == other.kind
        and one.header == other.header
        and one.tensors.keys() == other.tensors.keys()
        and all(tensor is other.tensors[name] for name, tensor in one.tensors.items())
    )
