"""Whether a party's node still lives for what it is there for.

``node's request -> party's gate -> heard``; ``message -> party -> around``; then ``stopped`` says what is wrong.

Flower's node may run on and do nothing: one refused heartbeat ends the thread that sends them, and a node whose app
ended before it took its message waits for an answer for ever. Its own bounds are 60 seconds without heartbeats and 90
without a word of an app; a node that is silent for longer than both waits for nothing.

Or it may lag: an app that works on for a run which ended answers in another run's turn, and from then on each answer
waits for another message. A node lags that passes an answer on before the party has answered the message which it was
handed last, or asks for another one while it owes an answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from mycel.engines.line import Control
from mycel.guard.gates import HEARTBEAT, POLL
from mycel.guard.handed import ANSWER

SILENT = 120.0  # seconds
Reply = Callable[[Control, bytes], tuple[Control, bytes]]


@dataclass
class Pulse:
    """Listens to a node and to the party that works for it."""

    clock: Callable[[], float] = time.monotonic
    _busy: int = 0

    def __post_init__(self) -> None:
        self.started()

    def started(self) -> None:
        """Take note that the node was started."""
        self._beat = self._deed = self.clock()
        self._owes = self._expects = self._lags = False

    def heard(self, path: str) -> None:
        """Take note of a request of the node's."""
        if path == HEARTBEAT:
            self._beat = self.clock()
            return
        self._deed = self.clock()
        self._lags |= (self._owes and path == POLL) or (self._expects and path == ANSWER)
        self._owes &= path != ANSWER

    def handed(self) -> None:
        """Take note of a message that the node was handed."""
        self._expects = True

    def around(self, reply: Reply) -> Reply:
        """Return ``reply``, whose work counts as the node's: it waits for it."""

        def counted(control: Control, frame: bytes) -> tuple[Control, bytes]:
            self._busy += 1
            try:
                return reply(control, frame)
            finally:
                self._busy, self._deed = self._busy - 1, self.clock()
                self._owes, self._expects = True, False

        return counted

    def stopped(self) -> str:
        """Return what the node has stopped doing, or nothing."""
        if self._lags:
            return "is an answer behind"
        now = self.clock()
        if now - self._beat > SILENT:
            return "sends no heartbeats"
        if not self._busy and now - self._deed > SILENT:
            return "neither asks for messages nor answers one"
        return ""
