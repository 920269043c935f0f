"""Whether a request is of now: the moment that its sender states, and a signature that was not seen before.

A node signs the moment of each request. The SuperLink takes a moment of up to 305 seconds ago and 5 ahead; so much may
two clocks differ, less what a request takes on its way and while the gate holds it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import datetime

TOLERANCE = 310.0  # seconds for which the SuperLink takes a signature
BEHIND, AHEAD = 280.0, 5.0  # seconds between the clocks that are borne
REMEMBERED = 1 << 16  # signatures of one party; a node makes some thousands of requests in that time


def clock_is_off(stated: str, now: datetime) -> str:
    """Return why a request is refused whose sender's clock shows another time than ours, or nothing."""
    try:
        behind = (now - datetime.fromisoformat(stated)).total_seconds()
    except (ValueError, TypeError):
        return ""  # no moment at all, which the SuperLink refuses
    if -AHEAD < behind < BEHIND:
        return ""
    found = f"more than {BEHIND:.0f} s behind" if behind > 0 else f"more than {AHEAD:.0f} s ahead of"
    return f"the party's clock is {found} the coordinator's: set both by a time server"


@dataclass
class Signatures:
    """Signatures of one party, as long as the SuperLink would take them."""

    seen: dict[bytes, float] = field(default_factory=dict)

    def objection(self, signature: str, now: float) -> str:
        """Return why a signature does not count, or nothing; from then on it was seen."""
        while self.seen and now - self.seen[oldest := next(iter(self.seen))] > TOLERANCE:
            del self.seen[oldest]
        name = hashlib.sha256(signature.encode()).digest()
        if not signature or name in self.seen:
            return "the request was sent before"
        if len(self.seen) >= REMEMBERED:
            return "more requests than a node makes"
        self.seen[name] = now
        return ""
