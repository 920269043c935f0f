"""Workers that do a simulation's real work: this process, or one process per core over one copy of the base.

A worker speaks JSON and parcel frames over a pipe; what it hosts is decided by the ``Host`` it is given, so the pool
knows nothing of systems. Workers are forked from a nursery, so they start in milliseconds and share its memory.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from queue import PriorityQueue, SimpleQueue
from typing import Protocol

from mycel.engines.nursery import Child, Nursery
from mycel.errors import EngineError, MycelError

ENDED = "the workers were ended while there was work to do"


@dataclass(frozen=True)
class Reply:
    """A worker's reply: an answer's frame and the party's new home, or why the party refused."""

    frame: bytes
    home: bytes
    refusal: str = ""


class Host(Protocol):
    """What runs inside a worker."""

    def open(self, arm: str, job: str) -> None:
        """Make an arm known; called before its first request."""

    def handle(self, arm: str, node: int, frame: bytes, home: bytes) -> tuple[bytes, bytes]:
        """Carry out one brief."""

    def close(self) -> None:
        """Give back whatever the host holds; nothing is asked of it afterwards."""


def _reply(host: Host, arm: str, node: int, frame: bytes, home: bytes) -> Reply:
    try:
        return Reply(*host.handle(arm, node, frame, home))
    except MycelError as error:
        return Reply(b"", b"", str(error) or type(error).__name__)


def _failed(node: int, trace: str) -> str:
    return f"the work of node {node} failed:\n{trace}"


class Inline:
    """Does the work in this process, at once."""

    def __init__(self, make_host: Callable[[], Host]) -> None:
        self._host = make_host()

    def open(self, arm: str, job: str) -> None:
        """Make an arm known."""
        self._host.open(arm, job)

    def submit(self, arm: str, node: int, frame: bytes, home: bytes, due: float = 0.0) -> asyncio.Future[Reply]:
        """Do the work now and return a finished future."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        try:
            future.set_result(_reply(self._host, arm, node, frame, home))
        except Exception as error:
            failure = EngineError(_failed(node, traceback.format_exc()))
            failure.__cause__ = error
            future.set_exception(failure)
        return future

    def close(self) -> None:
        """Give back what the host holds."""
        self._host.close()


@dataclass
class _Worker:
    child: Child
    opened: set[str] = field(default_factory=set)


@dataclass(order=True)
class _Task:
    due: float
    number: int
    arm: str = field(compare=False)
    node: int = field(compare=False)
    frame: bytes = field(compare=False)
    home: bytes = field(compare=False)
    reply: Future[Reply] = field(compare=False, default_factory=Future)


class WorkerPool:
    """One process per core; what is due first is done first, so that few answers lie and wait.

    Parameters
    ----------
    make_host : callable
        Returns the host that each worker runs.
    count : int
        Worker processes.
    """

    def __init__(self, make_host: Callable[[], Host], count: int) -> None:
        self._nursery = Nursery(lambda connection: serve(connection, make_host))
        self._jobs: dict[str, str] = {}
        self._closed = False
        self._changing = threading.Lock()
        self._tasks: PriorityQueue[_Task] = PriorityQueue()
        self._numbers = itertools.count()
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._all = [_Worker(self._nursery.start()) for _ in range(count)]
        for worker in self._all:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="mycel-worker")

    def open(self, arm: str, job: str) -> None:
        """Make an arm known; workers learn of it with their first request for it."""
        self._jobs[arm] = job

    def submit(self, arm: str, node: int, frame: bytes, home: bytes, due: float = 0.0) -> asyncio.Future[Reply]:
        """Queue the work and return a future of its reply."""
        task = _Task(due, next(self._numbers), arm, node, frame, home)
        self._tasks.put(task)
        self._threads.submit(self._do_next)
        return asyncio.wrap_future(task.reply)

    def _do_next(self) -> None:
        task = self._tasks.get()
        if not task.reply.set_running_or_notify_cancel():
            return
        try:
            reply = self._do(task)
        except BaseException as error:
            task.reply.set_exception(error)
        else:
            task.reply.set_result(reply)

    def _do(self, task: _Task) -> Reply:
        worker = self._idle.get()
        try:
            return self._exchange(worker, task)
        except (EOFError, OSError):
            worker = self._replace(worker)
            try:
                return self._exchange(worker, task)
            except (EOFError, OSError) as error:
                worker = self._replace(worker)
                raise EngineError(
                    f"the worker process died twice at node {task.node}'s work (out of memory?): "
                    "try engine.workers=1 or a smaller training.batch_size"
                ) from error
        finally:
            self._idle.put(worker)

    def _replace(self, worker: _Worker) -> _Worker:
        with self._changing:
            if self._closed:
                raise EngineError(ENDED)
            worker.child.connection.close()
            self._nursery.end(worker.child)
            fresh = _Worker(self._nursery.start())
            self._all[self._all.index(worker)] = fresh
        return fresh

    def _exchange(self, worker: _Worker, task: _Task) -> Reply:
        job = None if task.arm in worker.opened else self._jobs[task.arm]
        reply = exchange(worker.child.connection, task.arm, job, task.node, task.frame, task.home)
        worker.opened.add(task.arm)
        return reply

    def close(self) -> None:
        """End every worker; work that is still going on fails. Closing again does nothing."""
        with self._changing:
            if self._closed:
                return
            self._closed = True
            self._nursery.close()
        # A thread whose worker has gone is done at once; only then is no one left who reads the connections.
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._all:
            worker.child.connection.close()
        while not self._tasks.empty():
            reply = self._tasks.get().reply
            if reply.set_running_or_notify_cancel():  # a mere cancellation would never be heard of
                reply.set_exception(EngineError(ENDED))


def exchange(
    connection: Connection,
    arm: str,
    job: str | None,
    node: int,
    frame: bytes,
    home: bytes,
    answered: Callable[[], None] = lambda: None,
) -> Reply:
    """Have the process at the other end do one piece of work; ``answered`` may wait for its answer in its own way."""
    for part in (json.dumps({"arm": arm, "node": node, "job": job}).encode(), frame, home):
        connection.send_bytes(part)
    answered()
    verdict = json.loads(connection.recv_bytes())
    reply = Reply(connection.recv_bytes(), connection.recv_bytes(), verdict["refusal"])
    if verdict["crash"]:
        raise EngineError(_failed(node, verdict["crash"]))
    return reply


def serve(connection: Connection, make_host: Callable[[], Host]) -> None:
    """Do the work that ``exchange`` asks for at the other end, until nobody is there."""
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    host = make_host()
    while True:
        try:
            control = json.loads(connection.recv_bytes())
            frame, home = connection.recv_bytes(), connection.recv_bytes()
        except (EOFError, OSError):
            return
        crash, reply = "", Reply(b"", b"")
        try:
            if control["job"] is not None:
                host.open(control["arm"], control["job"])
            reply = _reply(host, control["arm"], control["node"], frame, home)
        except Exception:
            crash = traceback.format_exc()
        try:
            for part in (json.dumps({"refusal": reply.refusal, "crash": crash}).encode(), reply.frame, reply.home):
                connection.send_bytes(part)
        except OSError:  # whoever asked has gone
            return
