"""Copies of ranks' units: in other ranks' memory, sent between a step's own messages, and on disk.

In memory, two versions are kept: the last that is complete, and the one before it, as a rank may die while the newer
one is only complete at some. On disk, a unit is a parcel whose name holds its hash.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mycel.collectives.units import Unit, cloned, packed, unpacked
from mycel.collectives.waiting import LIMITS, done, group_of, receive
from mycel.errors import ParcelError, RunError
from mycel.wire.parcel import Parcel, Tensors

KEPT = 2  # versions: the newest may be whole only at some


@dataclass
class MemoryCopies:
    """One rank's copies: its own, and those that it keeps for others.

    Parameters
    ----------
    targets, sources : sequence of int
        Ranks that keep this one's units, and those whose units this one keeps.
    pieces : int
        Into how many messages a copy is divided, to travel between a step's own.
    """

    targets: Sequence[int]
    sources: Sequence[int]
    pieces: int
    sent: int = 0
    _versions: dict[int, list[Parcel | bytes]] = field(default_factory=dict)
    _group: dist.ProcessGroup | None = None
    _under_way: tuple[int, Parcel] | None = None
    _frame: Tensor | None = None
    _buffers: dict[int, Tensor] = field(default_factory=dict)
    _next: int = 0
    _works: list[dist.Work | None] = field(default_factory=list)

    def open(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        """Begin an epoch: ranks have new numbers, and copies travel on a group of their own."""
        self.targets, self.sources = targets, sources
        self._group = group_of()

    def begin(self, version: int, units: Mapping[int, Unit]) -> None:
        """Copy this rank's units as they are, and tell the others how long the copy is."""
        states = cloned((unit, held.state()) for unit, held in sorted(units.items()))
        own = Parcel("copy", {}, packed(states))
        self._under_way, self._next = (version, own), 0
        self._frame = torch.frombuffer(bytearray(own.to_bytes()), dtype=torch.uint8)
        length = torch.tensor([self._frame.numel()])
        works = [dist.isend(length, target, group=self._group) for target in self.targets]
        for source in self.sources:
            found = receive(torch.zeros(1, dtype=torch.int64), source, self._group)
            self._buffers[source] = torch.empty(int(found), dtype=torch.uint8)
        for work in works:
            done(work)

    def pump(self) -> None:
        """Send and receive the next message of the copy under way, if there is one; does not wait."""
        if self._under_way is None or self._frame is None or self._next >= self.pieces:
            return
        for target in self.targets:
            part = _part(self._frame, self._next, self.pieces)
            self.sent += part.numel()
            self._works.append(dist.isend(part, target, group=self._group, tag=self._next))
        for source in self.sources:
            part = _part(self._buffers[source], self._next, self.pieces)
            self._works.append(dist.irecv(part, source, group=self._group, tag=self._next))
        self._next += 1

    def finish(self) -> None:
        """Wait for the copy under way; from here on it can be gone back to."""
        if self._under_way is None:
            return
        while self._next < self.pieces:
            self.pump()
        for work in self._works:
            done(work)
        self._works.clear()
        version, own = self._under_way
        self._versions[version] = [own, *(buffer.numpy().tobytes() for buffer in self._buffers.values())]
        self._under_way = None
        for old in sorted(self._versions)[:-KEPT]:
            del self._versions[old]

    def abandon(self) -> None:
        """Drop what was under way: a rank has died. Complete copies stay."""
        self._works.clear()
        self._buffers.clear()
        self._under_way = self._frame = self._group = None

    def versions(self) -> dict[int, set[int]]:
        """Versions of each unit that lie here."""
        found: dict[int, set[int]] = {}
        for version in self._versions:
            for unit in self.states(version):
                found.setdefault(unit, set()).add(version)
        return found

    def states(self, version: int) -> dict[int, Tensors]:
        """Units at a version, this rank's own and the others'."""
        found: dict[int, Tensors] = {}
        for copy in self._versions.get(version, []):
            parcel = copy if isinstance(copy, Parcel) else Parcel.from_bytes(copy, LIMITS)
            found |= unpacked(parcel.tensors)
        return found

    def back_to(self, version: int) -> None:
        """Drop versions that will be made again."""
        for newer in [each for each in self._versions if each > version]:
            del self._versions[newer]


@dataclass
class DiskCopies:
    """Units in a folder that every rank can read: ``VERSION/UNIT-HASH``.

    Parameters
    ----------
    count : int
        Units of the chain; a version is whole when all are there.
    """

    folder: Path
    count: int

    def save(self, version: int, unit: int, state: Tensors) -> None:
        """Write a unit, to the disk itself; half-written files have another name."""
        frame = Parcel("unit", {"unit": unit, "version": version}, state).to_bytes()
        place = self.folder / f"{version:08}"
        place.mkdir(parents=True, exist_ok=True)
        temporary = place / f".{unit}-{os.getpid()}"
        with temporary.open("wb") as file:
            file.write(frame)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(place / f"{unit}-{hashlib.sha256(frame).hexdigest()[:32]}")

    def prune(self) -> None:
        """Remove what is older than the ``KEPT`` newest whole versions; of all ranks, one calls it."""
        kept = self.versions()[-KEPT:]
        for place in self.folder.iterdir() if kept else ():
            if place.name.isdecimal() and int(place.name) < kept[0]:
                shutil.rmtree(place, ignore_errors=True)

    def versions(self) -> list[int]:
        """Versions that are whole."""
        places = self.folder.iterdir() if self.folder.is_dir() else ()
        found = {int(place.name): self._units(place) for place in places if place.name.isdecimal()}
        return sorted(version for version, units in found.items() if len(units) == self.count)

    def load(self, version: int, unit: int) -> Tensors:
        """Read a unit; ``RunError`` when it is not what was written."""
        path = self._units(self.folder / f"{version:08}")[unit]
        frame = path.read_bytes()
        try:
            if hashlib.sha256(frame).hexdigest()[:32] != path.name.partition("-")[2]:
                raise ParcelError("its hash is another")
            return Parcel.from_bytes(frame, LIMITS).tensors
        except ParcelError as error:
            raise RunError(
                f"the checkpoint {str(path)!r} is damaged ({error}): remove its folder to go on from the one before"
            ) from error

    def _units(self, place: Path) -> dict[int, Path]:
        found = ((path.name.partition("-"), path) for path in place.iterdir())
        return {int(name[0]): path for name, path in found if name[0].isdecimal() and name[2]}


def _part(whole: Tensor, index: int, pieces: int) -> Tensor:
    size = -(-whole.numel() // pieces)
    return whole[index * size : (index + 1) * size]
