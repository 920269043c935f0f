"""How long to wait for a peer: learnt from its own answers, never set by hand."""

from __future__ import annotations

from collections import deque
from statistics import median

WINDOW = 32
LEAST = 1.0  # seconds for which an operating system may keep a healthy process from running
SPREADS = 8.0  # how many spreads above the middle an answer may be late
LONGEST = 600.0  # seconds that a ban doubles up to


class Patience:
    """What is known of one peer's pace and honesty.

    Work is counted in positions, each answer counting a few more for what it takes whatever it holds.
    """

    FIXED = 8

    def __init__(self) -> None:
        self._pace: deque[float] = deque(maxlen=WINDOW)  # seconds for one unit of work
        self.strikes = 0
        self.banned_until = 0.0

    def learn(self, positions: int, seconds: float) -> None:
        """Take note of an answer."""
        self._pace.append(seconds / (self.FIXED + positions))
        self.strikes = 0

    def allowance(self, positions: int) -> float | None:
        """Return the seconds after which an answer is given up; None while nothing is known."""
        if len(self._pace) < 3:
            return None
        middle = median(self._pace)
        spread = max(median(abs(each - middle) for each in self._pace), middle / 4)
        return max((middle + SPREADS * spread) * (self.FIXED + positions), LEAST) * float(2 ** min(self.strikes, 8))

    def ban(self, now: float, seconds: float) -> None:
        """Leave the peer alone for a while, twice as long each time in a row."""
        self.banned_until = now + min(seconds * 2.0**self.strikes, LONGEST)
        self.strikes += 1
