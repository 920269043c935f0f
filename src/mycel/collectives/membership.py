"""Who is there: epochs that a launcher announces, and process groups that are built anew without a restart.

The launcher holds the store. When a process dies it announces the next epoch with those that are left (and, where the
dead are replaced, with the newcomers). Whoever still computes notices by the collective that breaks: gloo's
connections to a dead process end at once, each survivor that leaves its group ends its own, and so the news reaches
every rank without a timeout. All meet again under the next epoch's prefix of the store.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from mycel.collectives.waiting import MEETING, unhurried
from mycel.errors import EngineError

HOST = "127.0.0.1"
NEWS = 30.0  # seconds within which a broken collective must be explained by somebody's death
PAUSE = 0.004  # seconds between looks at the store


def open_store(port: int = 0, host: str = HOST) -> TCPStore:
    """Open the launcher's store (port 0: any that is free), or connect to it."""
    return TCPStore(host, port, is_master=port == 0, wait_for_workers=False, timeout=MEETING)


def announce(store: TCPStore, epoch: int, members: Sequence[int], fresh: Sequence[int]) -> None:
    """Say who belongs to an epoch; ``fresh`` are those that bring nothing along.

    In one write: of two, a member could see the first alone and meet nobody under the epoch before.
    """
    store.set(f"epoch/{epoch}", json.dumps({"members": list(members), "fresh": list(fresh)}))


def release(store: TCPStore, epoch: int) -> None:
    """Say that an epoch's members are needed no more: their reports are there."""
    store.set(f"over/{epoch}", "1")


@dataclass
class Line:
    """A member's tie to the others, from epoch to epoch.

    Attributes
    ----------
    epoch : int
        That this member belongs to; -1 before the first.
    epochs : list of list of int
        Members of every epoch so far.
    broken : str
        What the collective said that broke last.
    """

    port: int
    member: int
    epoch: int = -1
    epochs: list[list[int]] = field(default_factory=list)
    broken: str = ""

    def __post_init__(self) -> None:
        self._store = open_store(self.port)

    @property
    def members(self) -> list[int]:
        """Of this epoch; a member's rank is its place."""
        return self.epochs[-1]

    def join(self) -> None:
        """Meet the members of the next epoch, or of a newer one if somebody dies on the way.

        Raises
        ------
        EngineError
            No new epoch is announced, or this member is none of its.
        """
        self._await(self.epoch + 1)
        while True:
            self._read()
            if self._met("here"):
                try:
                    dist.init_process_group(
                        "gloo",
                        store=PrefixStore(f"group/{self.epoch}/", self._store),
                        rank=self.members.index(self.member),
                        world_size=len(self.members),
                        timeout=MEETING,
                    )
                except RuntimeError:
                    self.leave()
                    self._await(self.epoch + 1)
                else:
                    unhurried()
                    return

    def leave(self) -> None:
        """End this member's connections, which tells those that still wait for it."""
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()  # a group that is still referred to keeps its connections

    def parted(self) -> bool:
        """Wait until the launcher has every member's report; False when one of them died before."""
        return self._awaited([f"over/{self.epoch}"])

    def _await(self, epoch: int) -> None:
        until = time.monotonic() + NEWS
        while not self._store.check([f"epoch/{epoch}"]):
            if time.monotonic() > until:
                raise EngineError(f"epoch {epoch} is not announced; the collective that broke before: {self.broken}")
            time.sleep(PAUSE)

    def _read(self) -> None:
        while self._store.check([f"epoch/{len(self.epochs)}"]):
            content = json.loads(self._store.get(f"epoch/{len(self.epochs)}"))
            self.epochs.append([int(member) for member in content["members"]])
        self.epoch = len(self.epochs) - 1
        if self.member not in self.members:
            raise EngineError(f"epoch {self.epoch} goes on without rank {self.member}: it was taken for dead")

    def _met(self, sign: str) -> bool:
        """Wait until every member has given a sign; False when a newer epoch is announced before."""
        self._store.set(f"{sign}/{self.epoch}/{self.member}", "1")
        return self._awaited([f"{sign}/{self.epoch}/{member}" for member in self.members])

    def _awaited(self, wanted: list[str]) -> bool:
        while not self._store.check(wanted):
            if self._store.check([f"epoch/{self.epoch + 1}"]):
                return False
            time.sleep(PAUSE)
        return True
