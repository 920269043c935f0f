"""Workers that do a simulation's real work: this process, or one process per core over one copy of the base.

A worker speaks JSON and parcel frames over a pipe; what it hosts is decided by the ``Host`` it is given, so the pool
knows nothing of systems. Workers are forked from a server that has imported the heavy libraries once, so they start
in milliseconds and share its memory.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Protocol

from mycel.errors import EngineError, MycelError


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

    def submit(self, arm: str, node: int, frame: bytes, home: bytes) -> asyncio.Future[Reply]:
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
        """Nothing to give back."""


@dataclass
class _Worker:
    connection: Connection
    process: multiprocessing.process.BaseProcess
    opened: set[str] = field(default_factory=set)


def prepare(preload: str) -> None:
    """Start the server that workers are forked from; it imports ``preload`` while this process does other things."""
    multiprocessing.set_forkserver_preload([preload])
    forkserver.ensure_running()


class WorkerPool:
    """One process per core; requests are served in the order of submission.

    Parameters
    ----------
    make_host : callable
        Importable function that returns the host each worker runs.
    count : int
        Worker processes.
    preload : str
        Module that holds the heavy imports, loaded once for all workers.
    """

    def __init__(self, make_host: Callable[[], Host], count: int, preload: str) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([preload])
        self._make_host = make_host
        self._jobs: dict[str, str] = {}
        self._closed = False
        self._changing = threading.Lock()
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._all = [self._start() for _ in range(count)]
        for worker in self._all:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="mycel-worker")

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._make_host), daemon=True)
        process.start()
        theirs.close()
        return _Worker(ours, process)

    def open(self, arm: str, job: str) -> None:
        """Make an arm known; workers learn of it with their first request for it."""
        self._jobs[arm] = job

    def submit(self, arm: str, node: int, frame: bytes, home: bytes) -> asyncio.Future[Reply]:
        """Queue the work and return a future of its reply."""
        return asyncio.get_running_loop().run_in_executor(self._threads, self._do, arm, node, frame, home)

    def _do(self, arm: str, node: int, frame: bytes, home: bytes) -> Reply:
        worker = self._idle.get()
        try:
            return self._exchange(worker, arm, node, frame, home)
        except (EOFError, OSError):
            worker = self._replace(worker)
            try:
                return self._exchange(worker, arm, node, frame, home)
            except (EOFError, OSError) as error:
                worker = self._replace(worker)
                raise EngineError(
                    f"the worker process died twice at node {node}'s work (out of memory?): "
                    "try engine.workers=1 or a smaller training.batch_size"
                ) from error
        finally:
            self._idle.put(worker)

    def _replace(self, worker: _Worker) -> _Worker:
        with self._changing:
            if self._closed:
                raise EngineError("the workers were ended while there was work to do")
            worker.connection.close()
            worker.process.kill()
            worker.process.join()
            fresh = self._start()
            self._all[self._all.index(worker)] = fresh
        return fresh

    def _exchange(self, worker: _Worker, arm: str, node: int, frame: bytes, home: bytes) -> Reply:
        control = {"arm": arm, "node": node, "job": None if arm in worker.opened else self._jobs[arm]}
        for part in (json.dumps(control).encode(), frame, home):
            worker.connection.send_bytes(part)
        verdict = json.loads(worker.connection.recv_bytes())
        reply = Reply(worker.connection.recv_bytes(), worker.connection.recv_bytes(), verdict["refusal"])
        worker.opened.add(arm)
        if verdict["crash"]:
            raise EngineError(_failed(node, verdict["crash"]))
        return reply

    def close(self) -> None:
        """End every worker; work that is still going on fails. Closing again does nothing."""
        with self._changing:
            if self._closed:
                return
            self._closed = True
            for worker in self._all:
                worker.process.terminate()
        # A thread whose worker has gone is done at once; only then is no one left who reads the connections.
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._all:
            worker.process.join()
            worker.connection.close()


def _serve(connection: Connection, make_host: Callable[[], Host]) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
