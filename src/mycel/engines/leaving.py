"""Parties that leave in the middle of a round, at a phase of one's choosing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mycel.engines.inprocess import Labour
from mycel.engines.pool import Reply
from mycel.wire.parcel import Parcel


@dataclass
class Leaving:
    """Does the work of ``labour``, but for requests that ``leaves(node, kind, version)`` names: those go unanswered.

    ``kind`` is ``work`` or one of a guard's own messages; ``version`` is known for work only, -1 otherwise.
    """

    labour: Labour
    leaves: Callable[[int, str, int], bool]

    def submit(self, arm: str, node: int, frame: bytes, home: bytes, *others: Any) -> asyncio.Future[Reply]:
        """Do the work, or say that the party has gone."""
        brief = Parcel.from_bytes(frame)
        if not self.leaves(node, brief.kind, int(brief.header.get("version", -1))):
            return self.labour.submit(arm, node, frame, home, *others)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        future.set_result(Reply(b"", b"", "the party has left"))
        return future
