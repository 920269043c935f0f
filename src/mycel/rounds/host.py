"""What a worker process of a simulation runs: one site per arm, over one copy of each base and store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mycel.data.tokens import TokenStore
from mycel.decisions.layout import ranks_of
from mycel.models.base import Base
from mycel.models.trainable import Trainable
from mycel.rounds.site import Job, Site

if TYPE_CHECKING:
    from mycel.collectives.leading import Leader
    from mycel.collectives.processes import RankProcesses


class Sites:
    """The sites of every arm that this process serves.

    Parameters
    ----------
    leader : Leader, optional
        Of the island whose rank 0 this process is; without one, parties that are islands get ranks of their own.
    """

    def __init__(self, leader: Leader | None = None) -> None:
        self._leader = leader
        self._sites: dict[str, Site] = {}
        self._bases: dict[str, Base] = {}
        self._stores: dict[str, TokenStore] = {}
        self._trainables: dict[tuple[str, str, int | None], Trainable] = {}
        self._jobs: dict[str, str] = {}
        self.islands: dict[int, RankProcesses] = {}

    def open(self, arm: str, job: str) -> None:
        """Make an arm known."""
        self._sites[arm] = Site(Job.from_json(job), self._bases, self._stores, self._trainables, self._leader)
        self._jobs[arm] = job

    def handle(self, arm: str, node: int, frame: bytes, home: bytes) -> tuple[bytes, bytes]:
        """Carry out one brief."""
        site = self._sites[arm]
        ranks = ranks_of(site.job.recipe.layout)
        if ranks == 1 or self._leader is not None:
            return site.handle(node, frame, home)
        return self._island(ranks).handle(arm, self._jobs[arm], node, frame, home)

    def _island(self, ranks: int) -> RankProcesses:
        from mycel.collectives.processes import RankProcesses

        if ranks not in self.islands:
            self.islands[ranks] = RankProcesses(ranks, Sites)
        return self.islands[ranks]

    def site(self, arm: str) -> Site:
        """Return the site of an arm."""
        return self._sites[arm]

    def close(self) -> None:
        """End the ranks of islands."""
        for island in self.islands.values():
            island.close()
        self.islands.clear()
