"""How long to wait for a peer, and for how long to leave it alone: learnt from what it did, never set by hand.

An answer is expected to take about as long as the peer's answers lately did, in proportion to its work. What it may
take beyond is learnt too: a few spreads, and twice the longest delay that was seen, which fades answer by answer. Who
has answered ``n`` times without a delay will be delayed once in about ``n`` answers more, so little experience is
trusted little: the caller's patience counts in full at first and falls with ``n`` squared. Patience, in seconds, is the
one knob.
"""

from __future__ import annotations

from collections import deque
from statistics import median

WINDOW = 32
SPREADS = 8.0  # how many spreads above the middle an answer may be late
FADING = 0.99  # of the longest delay, with each answer
LEAST = 3  # answers, before which nothing is known
LONGEST = 6  # doublings of a ban


class Patience:
    """What is known of one peer's pace and honesty.

    Work is counted in positions, each answer counting a few more for what it takes whatever it holds.

    Attributes
    ----------
    strikes : int
        Times in a row that it was late or wrong.
    banned_until : float
        Moment before which it is not to be asked.
    """

    FIXED = 8

    def __init__(self) -> None:
        self._pace: deque[float] = deque(maxlen=WINDOW)  # seconds for one unit of work
        self._answers = 0
        self._middle = self._spread = self._delay = 0.0
        self.strikes = 0
        self.banned_until = 0.0

    def learn(self, positions: int, seconds: float) -> None:
        """Take note of an answer."""
        work = self.FIXED + positions
        if self._answers >= LEAST:
            self._delay = max(FADING * self._delay, seconds - self._middle * work)
        self._answers += 1
        self._pace.append(seconds / work)
        self._middle = median(self._pace)
        self._spread = max(median(abs(each - self._middle) for each in self._pace), self._middle / 4)
        self.strikes = 0

    def allowance(self, positions: int, patience: float) -> float:
        """Return the seconds after which an answer is given up; ``patience`` while nothing is known."""
        if self._answers < LEAST:
            return patience
        usual = (self._middle + SPREADS * self._spread) * (self.FIXED + positions)
        return usual + 2 * self._delay + 2 * patience / (self._answers * (self._answers + 1))

    def late(self, now: float, waited: float, patience: float) -> None:
        """Take note that no answer came within ``waited`` seconds: it is left alone as long as it cost."""
        self._delay = max(self._delay, waited)
        self._ban(now, min(waited, patience))

    def lied(self, now: float, patience: float) -> None:
        """Take note that it answered what cannot be: it is left alone as long as one would wait for another."""
        self._ban(now, patience)

    def _ban(self, now: float, seconds: float) -> None:
        """Leave the peer alone for a while, twice as long each time in a row."""
        self.banned_until = now + seconds * 2.0 ** min(self.strikes, LONGEST)
        self.strikes += 1
