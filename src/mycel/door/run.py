"""Standing at the door: the HTTP server around the application."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from mycel.door.app import Door
from mycel.door.journal import Journal
from mycel.errors import EngineError
from mycel.generation.served import Served


def serve(
    served: Served,
    host: str,
    port: int,
    keys: Sequence[str] = (),
    ready: Callable[[str], None] | None = None,
    log: Path | None = None,
) -> None:
    """Serve a model until interrupted.

    Parameters
    ----------
    served : Served
        What answers; closed at the end.
    host, port
        Where to listen; port 0 takes a free one.
    keys : sequence of str
        Keys of which clients must bring one.
    ready : callable, optional
        Told the server's address when it listens.
    log : Path, optional
        Folder for the journal, of which ``mycel report`` makes a page.

    Raises
    ------
    EngineError
        When the port cannot be had.
    """
    try:
        journal = Journal(log) if log is not None else None
        try:
            if journal is not None:
                journal.event("opened", model=served.name, shares=list(served.shares))
                served.backend.report_to(journal.event)
            listen(Door(served, keys, journal).app, host, port, ready)
        finally:
            if journal is not None:
                journal.close()
    finally:
        served.backend.close()


def listen(app: ASGIApp, host: str, port: int, ready: Callable[[str], None] | None = None) -> None:
    """Serve an application until interrupted."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        sentence = f"port {port} of {host} cannot be had ({error.strerror}): choose another with --port"
        raise EngineError(sentence) from error
    listener.listen(1024)
    if threading.current_thread() is threading.main_thread():
        # The server raises again what ended it: by default that is the end of the process, with nothing closed.
        signal.signal(signal.SIGTERM, _leave)
    if ready is not None:
        ready(f"http://{host}:{listener.getsockname()[1]}")
    try:
        uvicorn.Server(configured(app)).run(sockets=[listener])
    finally:
        listener.close()


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def configured(app: ASGIApp) -> uvicorn.Config:
    """Return how the server around an application behaves."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        # Longer than clients keep idle connections: otherwise one is closed in the moment a client uses it again.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
        server_header=False,
    )
