"""What a worker process of a simulation runs: one site per arm, over one copy of each base and store."""

from __future__ import annotations

from mycel.data.tokens import TokenStore
from mycel.models.base import Base
from mycel.models.trainable import Trainable
from mycel.rounds.site import Job, Site


class Sites:
    """The sites of every arm that this process serves."""

    def __init__(self) -> None:
        self._sites: dict[str, Site] = {}
        self._bases: dict[str, Base] = {}
        self._stores: dict[str, TokenStore] = {}
        self._trainables: dict[tuple[str, str, int | None], Trainable] = {}

    def open(self, arm: str, job: str) -> None:
        """Make an arm known."""
        self._sites[arm] = Site(Job.from_json(job), self._bases, self._stores, self._trainables)

    def handle(self, arm: str, node: int, frame: bytes, home: bytes) -> tuple[bytes, bytes]:
        """Carry out one brief."""
        return self._sites[arm].handle(node, frame, home)

    def site(self, arm: str) -> Site:
        """Return the site of an arm."""
        return self._sites[arm]
