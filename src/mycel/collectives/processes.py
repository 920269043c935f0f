"""The ranks of an island as processes of one machine, started when first needed and again when one of them dies.

Whoever hosts a party speaks with rank 0 as with any worker: a job, a brief, an answer. All ranks hold a pipe to this
process, so the death of any is seen at once; then the others are ended, and the island begins again from its brief.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

from mycel.engines.nursery import Child, Nursery
from mycel.engines.pool import Host, Reply, exchange, serve
from mycel.errors import EngineError

if TYPE_CHECKING:
    from mycel.collectives.leading import Leader

GRACE = 1.0  # seconds for a rank's death to be seen after rank 0 failed of it
ATTEMPTS = 2  # at one brief; after that the answer is lost, as any party's may be


@dataclass
class RankProcesses:
    """Hosts parties on an island of ``size`` ranks.

    Parameters
    ----------
    make_host : callable
        Returns what works at rank 0, given its leader.
    attempts : int
        How often a brief is begun before it is given up.

    Attributes
    ----------
    restarts : int
        How often ranks that had died were started again.
    """

    size: int
    make_host: Callable[[Leader], Host]
    attempts: int = ATTEMPTS
    restarts: int = 0
    _children: list[Child] = field(default_factory=list)
    _opened: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="mycel-island-"))
        self._nursery = Nursery(lambda connection: _rank(connection, self.make_host))
        self._meetings = 0

    def pids(self) -> list[int]:
        """Process ids of the ranks that are there, rank 0 first."""
        return [child.pid for child in self._children]

    def handle(self, arm: str, job: str, node: int, frame: bytes, home: bytes) -> tuple[bytes, bytes]:
        """Carry out one brief.

        Raises
        ------
        EngineError
            The party refused, or ranks died at every attempt: this answer is lost.
        """
        said: BaseException | None = None
        for _ in range(self.attempts):
            try:
                reply = self._ask(arm, job, node, frame, home)
            except (EOFError, OSError) as error:
                said = error.__cause__ or said
                self._end()
                self.restarts += 1
                continue
            if reply.refusal:
                raise EngineError(reply.refusal)
            return reply.frame, reply.home
        raise EngineError(
            f"ranks of the island died {self.attempts} times at one brief (out of memory?): its answer is lost; "
            "try more ranks, layout.recompute or a smaller training.batch_size"
            + (f"; rank 0 said: {said}" if said else "")
        )

    def _ask(self, arm: str, job: str, node: int, frame: bytes, home: bytes) -> Reply:
        if not self._children:
            self._start()
        first, *others = [child.connection for child in self._children]
        told = None if arm in self._opened else job

        def answered() -> None:
            # The others never speak: their pipes have news only when they are gone.
            if any(connection is not first for connection in wait([first, *others])):
                raise EOFError

        try:
            reply = exchange(first, arm, told, node, frame, home, answered)
        except EngineError as error:
            # A killed rank's neighbours hear of it first: the kernel closes what was opened last before the pipe.
            if others and wait(others, GRACE):
                raise EOFError from error
            raise
        self._opened.add(arm)
        return reply

    def _start(self) -> None:
        self._meetings += 1
        self._children = [self._nursery.start() for _ in range(self.size)]
        for rank, child in enumerate(self._children):
            told = {"file": str(self._folder / str(self._meetings)), "rank": rank, "size": self.size}
            child.connection.send_bytes(json.dumps(told).encode())
        # Rank 0 reads no brief before all have met: one that died on the way there would leave it waiting.
        waiting = [child.connection for child in self._children]
        while waiting:
            for connection in wait(waiting):
                assert isinstance(connection, Connection)
                connection.recv_bytes()
                waiting.remove(connection)

    def _end(self) -> None:
        for child in reversed(self._children):  # rank 0 last: the others would mourn it
            self._nursery.end(child)
            child.connection.close()
        self._children.clear()
        self._opened.clear()

    def close(self) -> None:
        """End every rank."""
        self._end()
        self._nursery.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _rank(connection: Connection, make_host: Callable[[Leader], Host]) -> None:
    import torch

    from mycel.collectives.leading import Crew, Leader, follow
    from mycel.collectives.ranks import Meeting, process_group

    torch.set_num_threads(1)
    meeting = Meeting(**json.loads(connection.recv_bytes()))
    with process_group(meeting) as device:
        # Their line is part of the meeting: rank 0 would wait on it for one that has died, and read no brief.
        part = Crew(device) if meeting.rank else Leader(device)
        connection.send_bytes(b"met")
        if isinstance(part, Leader):
            serve(connection, lambda: make_host(part))
        else:
            follow(part)
