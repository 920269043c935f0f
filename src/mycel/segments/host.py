"""A peer at work: it answers calls for its segment, computing what arrives together in one batch."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mycel.engines.peers import Peers
from mycel.errors import EngineError, ParcelError
from mycel.segments.boundary import Boundary, sound
from mycel.segments.segment import Row, Segment

MOST_ROWS = 256  # sessions of one call
MOST_QUEUED = 1024  # calls that wait
AT_ONCE = 16  # positions computed without another thread, whose waking would cost a decode step a tenth of its time


@dataclass
class _Job:
    hidden: Tensor
    rows: list[Row]
    first: int
    last: int
    done: asyncio.Future[Tensor | None]


class Host:
    """Serves one segment to a swarm.

    Parameters
    ----------
    peers : Peers
        This member.
    segment : Segment
        What it computes.
    model : str
        The model's fingerprint; calls for another are refused.

    Attributes
    ----------
    steps, batches : int
        Calls computed, and the batches they were computed in.
    seconds : float
        Of one block for one token, measured here.
    """

    def __init__(self, peers: Peers, segment: Segment, model: str) -> None:
        self.peers, self.segment, self.model = peers, segment, model
        self.steps = self.batches = 0
        self.seconds = 0.0
        # OpenMP counts its threads for each thread that calls it.
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
        self._queue: asyncio.Queue[_Job] = asyncio.Queue()
        self._worker = asyncio.create_task(self._work())
        peers.serve(self.answer)

    async def start(self, lease: float = 15.0) -> None:
        """Measure, then announce what is served."""
        self.seconds = await self._in_thread(self._measure)
        facts = {"model": self.model, "first": self.segment.first, "last": self.segment.last, "seconds": self.seconds}
        await self.peers.announce({**facts, "depth": self.segment.cut.depth}, lease)

    async def replace(self, segment: Segment) -> None:
        """Serve another segment from now on; sessions of the old one are lost here, and rebuilt by their owners."""
        await self.peers.withdraw()
        self.segment = segment
        await self.start()

    async def close(self) -> None:
        """Stop working; the member itself stays."""
        self._worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._worker
        while not self._queue.empty():
            self._queue.get_nowait().done.cancel()
        await asyncio.to_thread(self._thread.shutdown)

    async def answer(self, sender: str, verb: str, frame: bytes) -> bytes:
        """Answer one call: ``step``, ``close``, ``forward``, ``backward`` or ``echo``."""
        if verb == "echo":
            return frame
        known: dict[str, Callable[[bytes], Awaitable[bytes]]] = {
            "step": self._step,
            "close": self._close,
            "forward": self._forward,
            "backward": self._backward,
        }
        if verb not in known:
            raise EngineError(f"{verb[:40]!r} is none of its verbs: {', '.join(known)}, echo")
        return await known[verb](frame)

    async def _step(self, frame: bytes) -> bytes:
        parcel = Boundary.unpack(frame, ("step",))
        rows = _rows(parcel.header.get("rows"))
        first, last = self._range(parcel.header)
        hidden = sound(parcel, "hidden", (sum(row.count for row in rows), self.segment.width))
        if self._queue.qsize() >= MOST_QUEUED:
            raise EngineError("it has too much to do; ask later")
        done: asyncio.Future[Tensor | None] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(_Job(hidden, rows, first, last, done))
        found = await done
        boundary = _boundary(parcel.header)
        return boundary.pack("lost", {}) if found is None else boundary.pack("stepped", {}, hidden=found)

    async def _close(self, frame: bytes) -> bytes:
        parcel = Boundary.unpack(frame, ("close",))
        for session in parcel.header.get("sessions", [])[:MOST_ROWS]:
            self.segment.slab.drop(str(session))
        return b""

    async def _forward(self, frame: bytes) -> bytes:
        parcel = Boundary.unpack(frame, ("forward",))
        first, last = self._range(parcel.header)
        hidden = sound(parcel, "hidden", self._shape(parcel.header))
        session = str(parcel.header.get("session"))
        found = await self._in_thread(lambda: self.segment.forward(hidden, session, first, last))
        return _boundary(parcel.header).pack("hidden", {}, hidden=found)

    async def _backward(self, frame: bytes) -> bytes:
        parcel = Boundary.unpack(frame, ("backward",))
        gradient = sound(parcel, "gradient", self._shape(parcel.header))
        session = str(parcel.header.get("session"))
        found = await self._in_thread(lambda: self.segment.backward(gradient, session))
        return _boundary(parcel.header).pack("gradient", {}, gradient=found)

    async def _work(self) -> None:
        while True:
            jobs = [await self._queue.get()]
            taken = {row.session for row in jobs[0].rows}
            while not self._queue.empty():
                more = self._queue.get_nowait()
                names = {row.session for row in more.rows}
                if (more.first, more.last) == (jobs[0].first, jobs[0].last) and not names & taken:
                    jobs.append(more)
                    taken |= names
                else:  # its turn comes with the next batch, behind what waits already
                    self._queue.put_nowait(more)
                    break
            await self._compute(jobs)

    async def _compute(self, jobs: list[_Job]) -> None:
        ready = []
        for job in jobs:
            if self._holds(job):
                ready.append(job)
            elif not job.done.done():
                job.done.set_result(None)
        if not ready:
            return
        hidden = torch.cat([job.hidden for job in ready])
        rows = [row for job in ready for row in job.rows]
        segment, first, last = self.segment, ready[0].first, ready[0].last
        try:
            if len(hidden) <= AT_ONCE:
                found = segment.infer(hidden, rows, first, last)
            else:
                found = await self._in_thread(lambda: segment.infer(hidden, rows, first, last))
        except Exception as error:  # whoever asked is told; the next batch is computed all the same
            for job in ready:
                if not job.done.done():
                    job.done.set_exception(EngineError(str(error)) if not isinstance(error, EngineError) else error)
            return
        self.steps += len(ready)
        self.batches += 1
        for job, part in zip(ready, torch.split(found, [len(job.hidden) for job in ready]), strict=True):
            if not job.done.done():
                job.done.set_result(part)

    def _holds(self, job: _Job) -> bool:
        slab = self.segment.slab
        return all(row.start == 0 or slab.lengths.get(row.session, -1) >= row.start for row in job.rows)

    def _range(self, header: dict[str, Any]) -> tuple[int, int]:
        first, last, segment = header.get("first"), header.get("last"), self.segment
        if header.get("model") != self.model:
            raise EngineError("it serves another model")
        if type(first) is not int or type(last) is not int or not segment.first <= first < last <= segment.last:
            raise EngineError(f"it holds blocks {segment.first} to {segment.last}, not {first} to {last}")
        return first, last

    def _shape(self, header: dict[str, Any]) -> tuple[int, ...]:
        shape = header.get("shape")
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 1 << 20 for n in shape):
            raise ParcelError(f"the header's shape is {str(shape)[:60]}: [batch, tokens] is needed")
        return (*shape, self.segment.width)

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _measure(self) -> float:
        """Return the seconds of one block for one token: the best of a few, the first of which warms up."""
        states = torch.zeros(1, 1, self.segment.width)
        best = float("inf")
        with torch.inference_mode():
            for _ in range(4):
                started = time.perf_counter()
                self.segment.cut.run(states, self.segment.first, self.segment.last)
                best = min(best, time.perf_counter() - started)
        return best / (self.segment.last - self.segment.first)


def _boundary(header: dict[str, Any]) -> Boundary:
    spec = header.get("codec", "raw")
    return Boundary(spec if isinstance(spec, str) else "raw")


def _rows(found: Any) -> list[Row]:
    if not isinstance(found, list) or not 0 < len(found) <= MOST_ROWS:
        raise ParcelError(f"the header's rows are {str(found)[:60]}: a list of 1 to {MOST_ROWS} is needed")
    rows = []
    for row in found:
        sane = isinstance(row, list) and [type(cell) for cell in row] == [str, int, int] and len(row[0]) <= 64
        if not sane or not 0 <= row[1] < 1 << 24 or not 0 < row[2] < 1 << 20:
            raise ParcelError(f"a row reads {str(row)[:80]}: [session, start, count] is needed")
        rows.append(Row(*row))
    if len({row.session for row in rows}) != len(rows):
        raise ParcelError("one session stands twice in a step")
    return rows
