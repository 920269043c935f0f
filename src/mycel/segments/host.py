"""A peer at work: it answers calls for its segment, computing what arrives together in one batch."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mycel.engines.peers import Peers
from mycel.errors import EngineError, ParcelError
from mycel.segments.boundary import Boundary, Form, sound
from mycel.segments.segment import Row, Segment
from mycel.segments.steps import MOST_ROWS, Forms, Reader, Step
from mycel.wire.parcel import Parcel

MOST_QUEUED = 1024  # calls that wait
AT_ONCE = 16  # positions computed without another thread, whose waking would cost a decode step a tenth of its time
STEPPED = {handed: Form("stepped", {"handed": handed}) for handed in (False, True)}


@dataclass
class _Job:
    hidden: Tensor
    rows: list[Row]
    first: int
    last: int
    done: asyncio.Future[Tensor | None] | None


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
        self.seconds = self._lately = 0.0  # the latter: of the last batch
        self._forms, self._reader, self._busy = Forms(), Reader(), False
        self._over: list[str] = []  # sessions that ended while a batch was computed
        # OpenMP counts its threads for each thread that calls it.
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
        self._queue: asyncio.Queue[_Job] = asyncio.Queue()
        self._worker = asyncio.create_task(self._work())
        peers.serve(self.answer, self.at_once)

    async def start(self, lease: float = 15.0) -> None:
        """Measure, then announce what is served."""
        self.seconds = await self._in_thread(lambda: self._measure(self.segment))
        await self._announce(lease)

    async def _announce(self, lease: float) -> None:
        facts = {"model": self.model, "first": self.segment.first, "last": self.segment.last, "seconds": self.seconds}
        await self.peers.announce({**facts, "depth": self.segment.cut.depth}, lease)

    async def replace(self, segment: Segment) -> None:
        """Serve another segment from now on; sessions of the old one are lost here, and rebuilt by their owners."""
        self.seconds = await self._in_thread(lambda: self._measure(segment))
        await self.peers.withdraw()
        self.segment = segment
        await self._announce(15.0)

    async def close(self) -> None:
        """Stop working; the member itself stays."""
        self._worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._worker
        while not self._queue.empty():
            _fail(self._queue.get_nowait(), EngineError("it leaves"))
        await asyncio.to_thread(self._thread.shutdown)

    async def answer(self, sender: str, verb: str, frame: bytes) -> bytes:
        """Answer one call: ``step``, ``close``, ``forward``, ``backward`` or ``echo``."""
        if verb == "echo":
            return frame
        if verb == "step":
            return await self._step(sender, frame)
        known: dict[str, Callable[[bytes], Awaitable[bytes]]] = {
            "close": self._close,
            "forward": self._forward,
            "backward": self._backward,
        }
        if verb not in known:
            raise EngineError(f"{verb[:40]!r} is none of its verbs: {', '.join(known)}, step, echo")
        return await known[verb](frame)

    def at_once(self, sender: str, verb: str, frame: bytes) -> bytes | Awaitable[bytes] | None:
        """Answer a step of few positions where it arrives, if nothing else is to be computed with it."""
        if verb != "step" or self._busy or not self._queue.empty():
            return None
        parcel, step = self._read(frame)
        if len(step.hidden) > AT_ONCE:
            return None
        job = _Job(step.hidden, step.session_rows(), step.stops[0].first, step.stops[0].last, None)
        found = self._run([job]) if self._holds(job) else None
        return self._answered(sender, parcel, step, found)

    async def _step(self, sender: str, frame: bytes) -> bytes:
        parcel, step = self._read(frame)
        if self._queue.qsize() >= MOST_QUEUED:
            raise EngineError("it has too much to do; ask later")
        done: asyncio.Future[Tensor | None] = asyncio.get_running_loop().create_future()
        stop = step.stops[0]
        self._queue.put_nowait(_Job(step.hidden, step.session_rows(), stop.first, stop.last, done))
        answer = self._answered(sender, parcel, step, await done)
        return answer if isinstance(answer, bytes) else await answer

    def _read(self, frame: bytes) -> tuple[Parcel, Step]:
        parcel = Boundary.unpack(frame, ("step",))
        step = self._reader.read(parcel, self.segment.width)
        self._check(step.model, step.stops[0].first, step.stops[0].last)
        return parcel, step

    def _answered(self, owner: str, parcel: Parcel, step: Step, found: Tensor | None) -> bytes | Awaitable[bytes]:
        """Hand on what was computed, and return the owner's answer."""
        boundary = _boundary(parcel.header)
        if found is None:
            return boundary.pack("lost", {})
        handed = len(step.stops) > 1 and self._hand_on(owner, step, found, boundary)
        frame = boundary.fill(STEPPED[handed], hidden=found)
        return self._leisurely(frame) if handed else frame

    async def _leisurely(self, frame: bytes) -> bytes:
        """Wait a little: the next peer is to begin undisturbed where it shares processors with the owner."""
        await asyncio.sleep(self._lately / 4)
        return frame

    def _hand_on(self, owner: str, step: Step, hidden: Tensor, boundary: Boundary) -> bool:
        onwards, number = step.onwards(hidden)
        return self.peers.hand_on(onwards.stops[0].peer, "step", self._forms.frame(boundary, onwards), owner, number)

    async def _close(self, frame: bytes) -> bytes:
        parcel = Boundary.unpack(frame, ("close",))
        self._over += [str(session) for session in parcel.header.get("sessions", [])[:MOST_ROWS]]
        if not self._busy:  # a batch in the other thread may hold them
            self._drop()
        return b""

    def _drop(self) -> None:
        while self._over:
            self.segment.slab.drop(self._over.pop())

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
                alike = (more.first, more.last) == (jobs[0].first, jobs[0].last)
                if alike and not names & taken and len(names | taken) <= self.segment.slab.most:
                    jobs.append(more)
                    taken |= names
                else:  # its turn comes with the next batch, behind what waits already
                    self._queue.put_nowait(more)
                    break
            await self._compute(jobs)

    async def _compute(self, jobs: list[_Job]) -> None:
        ready = []
        for job in jobs:
            try:
                if self._holds(job):
                    ready.append(job)
                elif job.done is not None and not job.done.done():
                    job.done.set_result(None)
            except EngineError as error:
                _fail(job, error)
        if not ready:
            return
        self._busy = True
        try:
            few = sum(len(job.hidden) for job in ready) <= AT_ONCE
            found = self._run(ready) if few else await self._in_thread(lambda: self._run(ready))
        except Exception as error:  # whoever asked is told; the next batch is computed all the same
            if len(ready) == 1:
                _fail(ready[0], error)
            else:  # what one of them asks is not to fail the others
                for job in ready:
                    await self._compute([job])
            return
        finally:
            self._busy = False
            self._drop()
        for job, part in zip(ready, torch.split(found, [len(job.hidden) for job in ready]), strict=True):
            if job.done is not None and not job.done.done():
                job.done.set_result(part)

    def _run(self, jobs: list[_Job]) -> Tensor:
        started = time.perf_counter()
        hidden = torch.cat([job.hidden for job in jobs]) if len(jobs) > 1 else jobs[0].hidden
        rows = [row for job in jobs for row in job.rows]
        try:
            found = self.segment.infer(hidden, rows, jobs[0].first, jobs[0].last)
        except (RuntimeError, LookupError, ValueError) as error:
            raise EngineError(str(error)) from error
        self._lately = time.perf_counter() - started
        self.steps += len(jobs)
        self.batches += 1
        return found

    def _holds(self, job: _Job) -> bool:
        slab = self.segment.slab
        for row in job.rows:
            if slab.turns.get(row.session, 0) > row.turn:
                raise EngineError("a later step of this session was here before")
        return all(row.start == 0 or slab.lengths.get(row.session, -1) >= row.start for row in job.rows)

    def _range(self, header: dict[str, Any]) -> tuple[int, int]:
        first, last = header.get("first"), header.get("last")
        if type(first) is not int or type(last) is not int:
            raise ParcelError(f"the header's blocks are {str((first, last))[:60]}: two numbers are needed")
        self._check(header.get("model"), first, last)
        return first, last

    def _check(self, model: Any, first: int, last: int) -> None:
        segment = self.segment
        if model != self.model:
            raise EngineError("it serves another model")
        if not segment.first <= first < last <= segment.last:
            raise EngineError(f"it holds blocks {segment.first} to {segment.last}, not {first} to {last}")

    def _shape(self, header: dict[str, Any]) -> tuple[int, ...]:
        shape = header.get("shape")
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 1 << 20 for n in shape):
            raise ParcelError(f"the header's shape is {str(shape)[:60]}: [batch, tokens] is needed")
        return (*shape, self.segment.width)

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _measure(self, segment: Segment) -> float:
        """Return the seconds of one block for one token: the best of a few, the first of which warms up."""
        states = torch.zeros(1, 1, segment.width)
        best = float("inf")
        with torch.inference_mode():
            for _ in range(4):
                started = time.perf_counter()
                segment.cut.run(states, segment.first, segment.last)
                best = min(best, time.perf_counter() - started)
        return best / (segment.last - segment.first)


def _fail(job: _Job, error: Exception) -> None:
    if job.done is not None and not job.done.done():
        job.done.set_exception(EngineError(str(error)) if not isinstance(error, EngineError) else error)


@lru_cache(16)
def _coded(spec: str) -> Boundary:
    return Boundary(spec)


def _boundary(header: dict[str, Any]) -> Boundary:
    spec = header.get("codec", "raw")
    return _coded(spec if isinstance(spec, str) else "raw")
