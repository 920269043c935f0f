"""The engine of a real federation: the coordinator's requests over Flower, on the real clock.

A frame of up to ``PART`` is a single question and a single answer. A longer one travels in pieces, each a message asked
for when the one before has come, so that no process on the way holds more than a piece.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from mycel.engines.engine import Arrival, Pending, Request
from mycel.engines.gathered import Gathered
from mycel.engines.line import Control, hang_up, receive, send
from mycel.errors import EngineError
from mycel.wire.shelf import Frame

PART = 1 << 27  # bytes of a frame that travel in one message
PIECE = 48 << 20  # bytes of each message that a longer frame travels in
AGAIN = 10.0  # seconds after which a question outside of the rounds is asked for the second time


@dataclass
class Errand:
    """One request on its way: how much of the brief is sent, and what has come of the answer."""

    request: Request
    sent: int = 0
    come: Gathered = field(default_factory=Gathered)


@dataclass
class FlowerEngine:
    """Carries requests to parties over a line to the ServerApp.

    Parameters
    ----------
    line : Connection
        The line that the ServerApp has opened; closing it ends Flower's run.
    addresses : sequence of int
        Flower's number of each node.
    start : float
        Engine seconds at which a resumed run goes on.
    most : int
        Longest answer that is accepted, in bytes.
    """

    line: Connection
    addresses: Sequence[int] = ()
    start: float = 0.0
    most: int = 1 << 31
    part: int = PART
    piece: int = PIECE
    _errands: dict[int, Errand] = field(default_factory=dict)
    _questions: dict[int, asyncio.Future[tuple[Control, bytes]]] = field(default_factory=dict)
    _arrived: asyncio.Queue[Arrival | EngineError] = field(default_factory=asyncio.Queue)
    _tags: int = 0

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._sending = threading.Lock()
        self._listener = threading.Thread(target=self._listen, daemon=True, name="mycel-flower")
        self._listener.start()

    def now(self) -> float:
        """Seconds since the run began, those before it was resumed included."""
        return self.start + time.monotonic() - self._began

    def expected_seconds(self, request: Request) -> float | None:
        """Only experience can tell."""
        return None

    def _send(self, address: int | None, control: Control, frame: bytes = b"") -> int:
        self._tags += 1
        target = {} if address is None else {"address": str(address)}
        try:
            with self._sending:
                send(self.line, {**control, **target, "tag": self._tags}, frame)
        except OSError as error:
            raise _lost() from error
        return self._tags

    async def question(self, address: int | None, control: Control) -> tuple[Control, bytes]:
        """Ask the party at ``address``, or the ServerApp itself, something outside of the rounds.

        It is asked again, later each time, for it may have been lost; nobody is given up.
        """
        future: asyncio.Future[tuple[Control, bytes]] = self._loop.create_future()
        pause = AGAIN
        while not future.done():
            self._questions[self._send(address, control)] = future
            await asyncio.wait([future], timeout=pause)
            pause *= 2
        return future.result()

    async def nodes(self) -> list[int]:
        """Flower's numbers of the nodes that are there now."""
        control, _ = await self.question(None, {"verb": "nodes"})
        if "nodes" not in control:
            raise EngineError(f"the SuperLink does not say who is there: {control.get('error')}")
        return [int(node) for node in control["nodes"]]

    def ask(self, request: Request, home: bytes | None = None) -> None:
        """Send a request; what a party has at home it keeps itself."""
        self._forward(Errand(request))

    def progress(self, request: Request) -> int:
        """Bytes of a request and of its answer that have crossed so far."""
        return sum(each.sent + each.come.length for each in self._errands.values() if each.request is request)

    def _forward(self, errand: Errand) -> None:
        """Send the next part of a brief; the last one is the question."""
        offset, whole = errand.sent, errand.request.frame
        errand.sent = min(offset + self._length(len(whole)), len(whole))
        verb = "ask" if errand.sent == len(whole) else "part"
        self._speak(errand, {"verb": verb, "offset": offset}, whole[offset : errand.sent])

    def _length(self, total: int) -> int:
        """Bytes of each message in which a frame of ``total`` bytes travels."""
        return self.part if total <= self.part else self.piece

    def _speak(self, errand: Errand, control: Control, part: bytes = b"") -> None:
        request = errand.request
        about = {"node": request.node, "generation": request.generation, "size": self.part, "piece": self.piece}
        self._errands[self._send(self.addresses[request.node], {**control, **about}, part)] = errand

    def _listen(self) -> None:
        with suppress(RuntimeError):  # the loop has ended
            try:
                while True:
                    self._loop.call_soon_threadsafe(self._take, *receive(self.line))
            except (EOFError, OSError):
                self._loop.call_soon_threadsafe(self._hang_up)
        self.line.close()

    def _hang_up(self) -> None:
        self._arrived.put_nowait(_lost())
        for future in self._questions.values():
            if not future.done():
                future.set_exception(_lost())

    def _take(self, control: Control, frame: bytes) -> None:
        tag = int(control["tag"])
        if tag in self._questions:
            future = self._questions[tag] if "gone" in control else self._questions.pop(tag)
            if "gone" not in control and not future.done():
                future.set_result((control, frame))
            return
        errand = self._errands[tag]
        if "gone" in control:
            self._arrive(errand, refusal="it has left: its node sends no heartbeats", left=True)
            return
        del self._errands[tag]
        said = control.get("said")
        if "error" in control:
            self._arrive(errand, refusal=f"its answer was lost on the way: {control['error']}", left=True)
        elif not isinstance(said, dict):
            self._arrive(errand, refusal="its answer is not laid out as one")
        elif "refusal" in said:
            self._arrive(errand, refusal=str(said["refusal"])[:500])
        elif errand.sent < len(errand.request.frame):
            self._forward(errand)
        else:
            self._gather(errand, said, frame)

    def _gather(self, errand: Errand, said: Control, frame: bytes) -> None:
        """Add a part of an answer to what has come, and ask for the next until all is there."""
        total = said.get("total")
        if type(total) is not int or not 0 <= total <= self.most:
            self._arrive(errand, refusal=f"its answer claims {total!s:.40} bytes; at most {self.most:,} are accepted")
        elif len(frame) != min(self._length(total), total - errand.come.length):
            self._arrive(errand, refusal=f"a part of its answer has {len(frame):,} bytes: other than was asked for")
        else:
            errand.come.add(frame)
            if errand.come.length < total:
                self._speak(errand, {"verb": "more", "offset": errand.come.length})
                return
            seconds = said.get("seconds")
            self._arrive(errand, errand.come.frame(), seconds=seconds if isinstance(seconds, int | float) else 0.0)

    def _arrive(
        self, errand: Errand, frame: Frame = b"", refusal: str = "", left: bool = False, seconds: float = 0.0
    ) -> None:
        request, at = errand.request, self.now()
        started = max(request.asked, at - seconds) if 0 <= seconds <= at else at
        self._arrived.put_nowait(
            Arrival(request.node, request.generation, frame, refusal, request.asked, started, at, at, left)
        )

    async def answer(self, until: float | None) -> Arrival | None:
        """Return the next answer, in the order of arrival."""
        seconds = None if until is None else max(until - self.now(), 0.0)
        if self._arrived.empty():  # a wait of no seconds would not even look
            try:
                arrival = await asyncio.wait_for(self._arrived.get(), seconds)
            except TimeoutError:
                return None
        else:
            arrival = self._arrived.get_nowait()
        if isinstance(arrival, EngineError):
            raise arrival
        return arrival

    def homes(self) -> Mapping[int, bytes]:
        """Nothing: what parties keep at home stays there."""
        return {}

    def pending(self) -> Sequence[Pending]:
        """Nothing: a party that is asked again repeats its answer."""
        return []

    async def close(self) -> None:
        """Hang up, which ends Flower's run."""
        hang_up(self.line)
        await asyncio.to_thread(self._listener.join)


def _lost() -> EngineError:
    return EngineError(
        "the line to the SuperLink is cut: start `mycel coordinator` again, and `--resume` goes on from the last round"
    )
