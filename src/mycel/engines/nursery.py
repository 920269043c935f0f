"""A process forked from this one while it is quiet, from which workers are forked whenever they are needed.

Workers share the libraries' memory with the process that started them and begin in milliseconds. They come from the
nursery, not from the process itself, so that none inherits a thread, a lock or an open file of a later moment.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import socket
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection, Pipe

from mycel.errors import EngineError

MESSAGE = 4096  # bytes; both sides' longest message
STANDARD = 3  # file descriptors 0, 1 and 2: input, output and errors

Main = Callable[[Connection], None]


@dataclass(frozen=True)
class Child:
    """A worker: its process and our end of its pipe."""

    pid: int
    connection: Connection


class Nursery:
    """Starts and ends worker processes that run ``main`` over a pipe; when this process ends, so do they."""

    def __init__(self, main: Main) -> None:
        self._asking = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A collection writes into every object it visits, and memory that is written is shared no more.
        gc.collect()
        gc.freeze()
        with warnings.catch_warnings():
            # Threads that are asleep in a library are no danger to a child that never enters their regions.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            self._pid = os.fork()
        if not self._pid:
            _alone(lambda: _attend(theirs, main), theirs.fileno())
        theirs.close()

    def start(self) -> Child:
        """Fork a worker."""
        ours, theirs = Pipe()
        with theirs:
            pid = self._ask({"start": True}, [theirs.fileno()])["pid"]
        return Child(pid, ours)

    def end(self, child: Child) -> None:
        """Kill a worker and wait until it is gone; one that has ended already is no error."""
        self._ask({"end": child.pid}, [])

    def close(self) -> None:
        """End the nursery and every worker that is left."""
        self._socket.close()
        gc.unfreeze()
        os.waitpid(self._pid, 0)

    def _ask(self, message: dict[str, int | bool], descriptors: list[int]) -> dict[str, int]:
        try:
            with self._asking:
                socket.send_fds(self._socket, [json.dumps(message).encode()], descriptors)
                reply: dict[str, int] = json.loads(self._socket.recv(MESSAGE))
        except (OSError, ValueError) as error:
            raise EngineError(
                "the process that starts the workers has gone (out of memory?): `--resume` goes on from the last round"
            ) from error
        return reply


def _alone(work: Callable[[], None], *keep: int) -> None:
    """Do ``work`` in a process that was just forked and end it, with no file open but the standard ones and ``keep``.

    Nothing of the parent's may run here: no destructor, no handler at the exit, and no lock of its may stay held.
    """
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        bounds = [STANDARD - 1, *sorted(keep), resource.getrlimit(resource.RLIMIT_NOFILE)[0]]
        for before, after in pairwise(bounds):
            os.closerange(before + 1, after)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _attend(asked: socket.socket, main: Main) -> None:
    """Fork and end workers as asked, until whoever asks is gone; then end those that are left."""
    alive: set[int] = set()
    while True:
        content, descriptors, _, _ = socket.recv_fds(asked, MESSAGE, 1)
        if not content:
            break
        message = json.loads(content)
        pid = message.get("end", 0)
        if descriptors:
            pid = os.fork()
            if not pid:
                _alone(partial(main, Connection(descriptors[0])), descriptors[0])
            os.close(descriptors[0])
            alive.add(pid)
        elif pid in alive:
            _end(pid)
            alive.remove(pid)
        asked.send(json.dumps({"pid": pid}).encode())
    for pid in alive:
        _end(pid)


def _end(pid: int) -> None:
    # Nobody else waits for it, so until this line the number cannot have become another process's.
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
