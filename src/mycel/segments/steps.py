"""A step on the wire: new positions of sessions, and the peers that compute them one after another.

The first peer asks the second in the owner's name as soon as it has computed, and so on; each also answers the owner,
who keeps every state to survive a loss. The header of a step is the same for every token, so it is written and checked
once; what changes travels as numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mycel.errors import EngineError, ParcelError
from mycel.segments.boundary import Boundary, Form, sound
from mycel.segments.segment import Row
from mycel.wire.parcel import Parcel

MOST_ROWS = 256  # sessions of one call
MOST_STOPS = 64  # peers on one way
MOST_FORMS = 64
NOBODY = torch.empty(0, 16, dtype=torch.uint8)


@dataclass(frozen=True)
class Stop:
    """Blocks that a peer computes, and the sessions' names there."""

    peer: str
    first: int
    last: int
    sessions: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """What one call asks for.

    Attributes
    ----------
    model : str
        Its fingerprint.
    stops : tuple of Stop
        The peer that is asked, and those that it hands on to.
    rows : Tensor
        Start, count and turn of each session, ``[sessions, 3]``. Turns of a session only ever rise: an older one that
        comes late, over some slow neighbour, is refused.
    hidden : Tensor
        ``[sum of counts, width]``.
    numbers : Tensor
        Under which the owner awaits the answers of all stops but the first, ``[stops - 1, 16]`` bytes.
    """

    model: str
    stops: tuple[Stop, ...]
    rows: Tensor
    hidden: Tensor
    numbers: Tensor

    def session_rows(self) -> list[Row]:
        """Return the rows under the first stop's names."""
        return [Row(name, *row) for name, row in zip(self.stops[0].sessions, self.rows.tolist(), strict=True)]

    def onwards(self, hidden: Tensor) -> tuple[Step, bytes]:
        """Return the step that follows on this one, and the number under which its answer is awaited."""
        step = Step(self.model, self.stops[1:], self.rows, hidden, self.numbers[1:])
        return step, self.numbers[0].numpy().tobytes()


class Forms:
    """The headers of the steps that one member sends."""

    def __init__(self) -> None:
        self._forms: dict[tuple[str, tuple[Stop, ...]], Form] = {}

    def frame(self, boundary: Boundary, step: Step) -> bytes:
        """Return the call's frame."""
        form = self._forms.get((step.model, step.stops))
        if form is None:
            stops = [[stop.peer, stop.first, stop.last, list(stop.sessions)] for stop in step.stops]
            if len(self._forms) >= MOST_FORMS:
                self._forms.clear()
            form = self._forms[step.model, step.stops] = Form("step", {"model": step.model, "stops": stops})
        awaited = {"numbers": step.numbers.contiguous()} if len(step.stops) > 1 else {}
        return boundary.fill(form, hidden=step.hidden.contiguous(), rows=step.rows, **awaited)


class Reader:
    """Reads calls; a header that came before was checked before."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[dict[str, Any], tuple[Stop, ...]]] = {}

    def read(self, parcel: Parcel, width: int) -> Step:
        """Read a call after checking all it says; ``ParcelError`` or ``EngineError`` when it makes no sense."""
        stops = self._stops(parcel.header)
        rows = _whole(parcel, "rows", torch.int64, (len(stops[0].sessions), 3))
        awaited = len(stops) - 1
        numbers = _whole(parcel, "numbers", torch.uint8, (awaited, 16)) if awaited else NOBODY
        total = 0
        for start, count, turn in rows.tolist():
            if not (0 <= start < 1 << 24 and 0 < count < 1 << 20 and turn >= 0):
                raise ParcelError(f"a row reads {[start, count, turn]}: start, count and turn are needed")
            total += count
        return Step(parcel.header["model"], stops, rows, sound(parcel, "hidden", (total, width)), numbers)

    def _stops(self, header: dict[str, Any]) -> tuple[Stop, ...]:
        known = self._known.get(id(header))
        if known is not None and known[0] is header:
            return known[1]
        if not isinstance(header.get("model"), str):
            raise ParcelError("the header names no model")
        stops = _stops(header.get("stops"))
        if len(self._known) >= MOST_FORMS:
            self._known.clear()
        self._known[id(header)] = header, stops
        return stops


def _stops(found: Any) -> tuple[Stop, ...]:
    if not isinstance(found, list) or not 0 < len(found) <= MOST_STOPS:
        raise ParcelError(f"the header's stops are {str(found)[:60]}: a list of 1 to {MOST_STOPS} is needed")
    stops: list[Stop] = []
    for each in found:
        sane = isinstance(each, list) and [type(cell) for cell in each] == [str, int, int, list]
        if not sane or len(each[0]) > 64 or not _names(each[3]):
            raise ParcelError(f"a stop reads {str(each)[:80]}: [peer, first, last, sessions] is needed")
        stops.append(Stop(each[0], each[1], each[2], tuple(each[3])))
    for before, after in pairwise(stops):
        if after.first != before.last or len(after.sessions) != len(before.sessions):
            raise EngineError(f"{after.peer[:64]!r} does not go on where {before.peer[:64]!r} ends")
    return tuple(stops)


def _names(found: Sequence[Any]) -> bool:
    """Return whether this is a list of distinct names of sessions."""
    named = all(type(name) is str and 0 < len(name) <= 64 for name in found)
    return named and 0 < len(found) <= MOST_ROWS and len(set(found)) == len(found)


def _whole(parcel: Parcel, name: str, kind: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    found = parcel.tensors.get(name)
    if found is None or found.dtype != kind or tuple(found.shape) != shape:
        raise ParcelError(f"the parcel's {name!r} is not {kind} of {shape}")
    return found
