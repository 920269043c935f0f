"""Whoever starts the ranks of an enduring program: sees deaths by the end of a pipe, and says who goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

from mycel.collectives.membership import announce, open_store, release
from mycel.collectives.waiting import LIMITS
from mycel.engines.nursery import Child, Nursery
from mycel.errors import EngineError
from mycel.wire.parcel import Parcel

MOST_DEATHS = 32  # of one program; more are no accident


@dataclass
class Keeper:
    """Starts ranks and keeps them going.

    Parameters
    ----------
    job : callable
        What a rank is told: its member, and whether it begins with the program; "port" and "epoch" are added.
    replaces : bool
        Whether the dead are started again.
    together : bool
        Whether one death ends all, which then begin again.
    limit : float or None
        Seconds after which ranks that hang are ended.
    mourn : callable
        Told who died.

    Attributes
    ----------
    stayed : set of int
        Members whose process was there from beginning to end.
    reports : dict of int to Parcel
        What each member sent when it was done.
    """

    nursery: Nursery
    size: int
    job: Callable[[int, bool], dict[str, Any]]
    replaces: bool = False
    together: bool = False
    limit: float | None = None
    mourn: Callable[[list[int]], None] = lambda dead: None
    epoch: int = 0
    reports: dict[int, Parcel] = field(default_factory=dict)
    _children: dict[int, Child] = field(default_factory=dict)

    def run(self) -> dict[int, Parcel]:
        """Return every member's report; ``EngineError`` when one fails, when too many die, or they hang."""
        self._store = open_store()
        members = list(range(self.size))
        self.stayed = set(members)
        until = None if self.limit is None else time.monotonic() + self.limit
        deaths = 0
        try:
            for member in members:
                self._start(member, True)
            announce(self._store, 0, members, members)
            while len(self.reports) < len(self._children):
                dead = self._listen(until)
                deaths += len(dead)
                if deaths > MOST_DEATHS or (dead and len(dead) == len(self._children) and not self.replaces):
                    raise EngineError(f"{deaths} ranks died (out of memory?): resume from a checkpoint on disk")
                if dead:
                    self.mourn(dead)
                    self._go_on(dead)
            release(self._store, self.epoch)
        finally:
            for member in list(self._children):
                self._end(member)
        return self.reports

    def _start(self, member: int, first: bool) -> None:
        child = self.nursery.start()
        told = {**self.job(member, first), "member": member, "port": self._store.port, "epoch": self.epoch}
        child.connection.send_bytes(json.dumps(told).encode())
        self._children[member] = child

    def _end(self, member: int) -> None:
        child = self._children.pop(member)
        self.nursery.end(child)
        child.connection.close()

    def _listen(self, until: float | None) -> list[int]:
        """Wait for reports and deaths, also of those that have reported; return the dead."""
        waiting = {child.connection: member for member, child in self._children.items()}
        ready = wait(list(waiting), None if until is None else max(0.0, until - time.monotonic()))
        if not ready:
            late = sorted(set(waiting.values()) - set(self.reports))
            raise EngineError(f"ranks {late} hang: they are not done after {self.limit:g} s")
        dead = []
        for connection in ready:
            member = waiting[connection]  # type: ignore[index]
            try:
                report = Parcel.from_bytes(self._children[member].connection.recv_bytes(), LIMITS)
            except (EOFError, OSError):
                dead.append(member)
                continue
            if "error" in report.header:
                raise EngineError(f"rank {member} failed: {report.header['error']}")
            if report.header["epoch"] == self.epoch:  # one of an epoch that is over will come again
                self.reports[member] = report
        return dead

    def _go_on(self, dead: list[int]) -> None:
        """Announce who goes on; start those that are replaced."""
        gone = list(self._children) if self.together else dead
        self.stayed.difference_update(gone)
        self.reports.clear()
        for member in gone:
            self._end(member)
        self.epoch += 1
        fresh = gone if self.replaces else []
        for member in fresh:
            self._start(member, False)
        announce(self._store, self.epoch, sorted(self._children), fresh)
