"""The same piece of work on several ranks of this machine, forked from this process: for proofs and measurements."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mycel.collectives.ranks import Meeting, process_group
from mycel.engines.nursery import Nursery
from mycel.errors import EngineError

LIMIT = 120.0  # seconds; then the ranks are ended


def together(size: int, work: Callable[[torch.device], Any]) -> list[Any]:
    """Return what ``work`` returns on each rank, as JSON keeps it; it may use all of ``torch.distributed``.

    Raises
    ------
    EngineError
        A rank failed or died, or they took too long.
    """
    with tempfile.TemporaryDirectory(prefix="mycel-ranks-") as folder:
        nursery = Nursery(lambda connection: _rank(connection, work))
        children = []
        try:
            children = [nursery.start() for _ in range(size)]
            for rank, child in enumerate(children):
                told = {"file": str(Path(folder) / "meeting"), "rank": rank, "size": size}
                child.connection.send_bytes(json.dumps(told).encode())
            return _answers([child.connection for child in children])
        finally:
            for child in children:
                nursery.end(child)
                child.connection.close()
            nursery.close()


def _answers(connections: list[Connection]) -> list[Any]:
    found: dict[int, Any] = {}
    until = time.monotonic() + LIMIT
    while len(found) < len(connections):
        waiting = [connection for rank, connection in enumerate(connections) if rank not in found]
        ready = wait(waiting, max(0.0, until - time.monotonic()))
        if not ready:
            raise EngineError(f"{len(waiting)} of {len(connections)} ranks are not done after {LIMIT:g} s")
        for connection in ready:
            rank = connections.index(connection)  # type: ignore[arg-type]
            try:
                answer = json.loads(connections[rank].recv_bytes())
            except (EOFError, OSError) as error:
                raise EngineError(f"rank {rank} died") from error
            if "error" in answer:
                raise EngineError(f"rank {rank} failed: {answer['error']}")
            found[rank] = answer["result"]
    return [found[rank] for rank in range(len(connections))]


def _rank(connection: Connection, work: Callable[[torch.device], Any]) -> None:
    torch.set_num_threads(1)
    meeting = Meeting(**json.loads(connection.recv_bytes()))
    with process_group(meeting) as device:
        dist.barrier()  # one that failed before the others have met would be taken for one that died
        try:
            answer = {"result": work(device)}
        except Exception as error:  # whatever it is, the others wait for this rank: it has to be told
            answer = {"error": f"{type(error).__name__}: {error}"}
        # Told before it leaves: the others fail of its leaving, and are not to be heard first.
        connection.send_bytes(json.dumps(answer).encode())
