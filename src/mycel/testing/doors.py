"""A door in this process, on a free port of loopback, for as long as a block of code runs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from mycel.door.app import Door
from mycel.door.journal import Journal
from mycel.door.run import configured
from mycel.generation.served import Served


@contextmanager
def standing(served: Served, log: Path | None = None) -> Iterator[str]:
    """Yield the door's address; the model is closed at the end."""
    journal = Journal(log) if log is not None else None
    if journal is not None:
        served.backend.report_to(journal.event)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    server = uvicorn.Server(configured(Door(served, (), journal).app))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
        if journal is not None:
            journal.close()
        served.backend.close()
