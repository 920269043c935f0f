"""A local line between two processes of one owner: JSON and bytes over a socket file that only the owner may open."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

from mycel.errors import EngineError

Control = dict[str, Any]
LINE = "MYCEL_LINE"  # environment of the SuperLink: where coordinators' processes listen, each for its own job


def place_of(line: str | Path, job: str) -> Path:
    """Return where a job's ServerApp dials: one that was left by a killed run must not serve the next one."""
    return Path(f"{line}-{hashlib.sha256(job.encode()).hexdigest()[:16]}")


def send(line: Connection, control: Control, frame: bytes | memoryview = b"") -> None:
    """Send one message: what is wanted or said, and bytes that go with it."""
    line.send_bytes(json.dumps(control).encode())
    line.send_bytes(frame)


def receive(line: Connection) -> tuple[Control, bytes]:
    """Wait for one message; ``EOFError`` once the other side has gone."""
    return json.loads(line.recv_bytes()), line.recv_bytes()


@contextmanager
def dial(path: str) -> Iterator[Connection]:
    """Open a line to whoever listens at ``path``."""
    try:
        line = Client(path, "AF_UNIX")
    except OSError as error:
        raise EngineError(f"nobody listens at {path!r} ({error.strerror}): was the process ended?") from error
    with line:
        yield line


def listen(path: Path) -> socket.socket:
    """Listen at ``path``, in a folder that only its owner may enter."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    path.unlink(missing_ok=True)
    door = socket.socket(socket.AF_UNIX)
    door.bind(str(path))
    door.listen()
    return door


def accept(door: socket.socket) -> Connection:
    """Wait for whoever dials."""
    return opened(door.accept()[0])


def serve(door: socket.socket, reply: Callable[[Control, bytes], tuple[Control, bytes]]) -> None:
    """Answer whoever dials, one after another, until the door is closed."""
    while True:
        try:
            line = accept(door)
        except OSError:
            return
        # Whoever asked may end in the middle of a word; the next one is answered all the same.
        with line, suppress(EOFError, OSError, ValueError):
            send(line, *reply(*receive(line)))


def opened(caller: socket.socket) -> Connection:
    """Make a line of a caller's socket."""
    caller.setblocking(True)
    return Connection(caller.detach())


def hang_up(line: Connection) -> None:
    """End a line, also for a thread that waits for a message on it; whoever waits closes it."""
    with suppress(OSError), socket.socket(fileno=os.dup(line.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)
