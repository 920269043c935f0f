"""Deadlines learnt from arrivals: no timeout is set by hand, ``patience`` is the one knob.

A node is expected to take about as long as it lately did; until it has answered, as long as the engine predicts;
failing that, as long as the others. The allowance is ``median + patience * max(MAD, median / 4)``, doubled for each
time in a row that the node stayed silent. Where the engine predicts nothing, little experience is trusted little: from
``n`` observations the second term is ``1 + 4 / n`` times as wide. With nothing to go by, there is no deadline.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from mycel.engines.engine import Arrival, Engine, Request

WINDOW = 16
DOUBT = 4


@dataclass
class Deadlines:
    """Remembers how long each node took from question to answer."""

    recent: dict[int, deque[float]] = field(default_factory=dict)
    silent: Counter[int] = field(default_factory=Counter)

    def learn(self, arrival: Arrival) -> None:
        """Take note of an answer."""
        self.recent.setdefault(arrival.node, deque(maxlen=WINDOW)).append(arrival.at - arrival.asked)
        self.silent.pop(arrival.node, None)

    def lost(self, node: int) -> None:
        """Take note that a node stayed silent: the next allowance is twice as long."""
        self.silent[node] += 1

    def of(self, request: Request, engine: Engine, patience: float) -> float | None:
        """Return the moment by which ``request`` should be answered."""
        taken = list(self.recent.get(request.node, ()))
        predicted = engine.expected_seconds(request)
        if predicted is not None:
            taken.append(predicted)
        if not taken:
            taken = [seconds for node in self.recent.values() for seconds in node]
        if not taken:
            return None
        doubt = 1 + DOUBT / len(taken) if predicted is None else 1.0
        return request.asked + allowance(taken, patience, doubt, self.silent[request.node])


@dataclass
class Wait:
    """How long an answer of one place, asked again and again, is waited for.

    Parameters
    ----------
    patience : float
        How far beyond the usual, as for parties.
    """

    patience: float
    taken: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    silent: int = 0

    def learn(self, seconds: float) -> None:
        """Take note of an answer."""
        self.taken.append(seconds)
        self.silent = 0

    def lost(self) -> None:
        """Take note that none came."""
        self.silent += 1

    @property
    def seconds(self) -> float | None:
        """Seconds for the next; None with nothing to go by."""
        taken = list(self.taken)
        return allowance(taken, self.patience, 1 + DOUBT / len(taken), self.silent) if taken else None


def allowance(taken: Sequence[float], patience: float, doubt: float, silent: int) -> float:
    """Return for how many seconds to wait where earlier answers took as many as ``taken``."""
    middle = median(taken)
    spread = doubt * max(median(abs(seconds - middle) for seconds in taken), middle / 4)
    return (middle + patience * spread) * float(2 ** min(silent, 16))
