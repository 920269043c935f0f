"""Who computes which units, for whom: pure data, and where a unit comes from when its holder is gone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mycel.errors import EngineError, RecipeError

Inventory = Mapping[int, Collection[int]]  # unit: versions of it that can be had


@dataclass(frozen=True)
class Segment:
    """A member's consecutive units, ``first`` to before ``last``."""

    member: int
    first: int
    last: int

    @property
    def units(self) -> range:
        """The units' indices."""
        return range(self.first, self.last)


@dataclass(frozen=True)
class Formation:
    """How members share out a step.

    Attributes
    ----------
    pipelines : tuple of tuple of Segment
        Each holds the whole chain, in order; a member may hold several segments of one pipeline.
    micro_batches : tuple of tuple of int
        Which pieces of the step's batch go through each pipeline.
    shadows : tuple of Segment
        Units that a member keeps up to date besides its own.
    """

    pipelines: tuple[tuple[Segment, ...], ...]
    micro_batches: tuple[tuple[int, ...], ...]
    shadows: tuple[Segment, ...] = ()

    def needs(self) -> dict[int, set[int]]:
        """Units that each member must have."""
        needed: dict[int, set[int]] = {}
        for segment in (*(part for pipeline in self.pipelines for part in pipeline), *self.shadows):
            needed.setdefault(segment.member, set()).update(segment.units)
        return needed

    def check(self, units: int, pieces: int) -> None:
        """Refuse a formation that misses a unit or a piece of the batch."""
        for pipeline in self.pipelines:
            if [unit for segment in pipeline for unit in segment.units] != list(range(units)):
                raise RecipeError(
                    f"a pipeline holds {pipeline}, which is not every one of {units} units once, in order"
                )
        if sorted(piece for share in self.micro_batches for piece in share) != list(range(pieces)):
            raise RecipeError(f"the pipelines' pieces are {self.micro_batches}, not each of {pieces} once")


class Recovery(ABC):
    """A way of going on: which formation follows from who was there, epoch by epoch."""

    replaces = False  # whether a process that died is started again, with nothing in it
    redundant = False  # whether shadows compute forward while their holder waits

    @abstractmethod
    def formation(self, epochs: Sequence[Sequence[int]]) -> Formation:
        """Return the formation of the last epoch; ``EngineError`` when those that are left cannot go on."""

    def keepers(self, member: int) -> tuple[int, ...]:
        """Members that keep copies of this member's units in memory."""
        return ()


@dataclass(frozen=True)
class Transfer:
    """A unit that one member sends to another."""

    unit: int
    source: int
    target: int


def restoration(
    needs: Mapping[int, Collection[int]], inventories: Mapping[int, Inventory]
) -> tuple[int, list[Transfer]]:
    """Return the newest version at which every needed unit can be had, and what must be sent for it.

    Sources are chosen so that none sends much more than the others.

    Raises
    ------
    EngineError
        There is no version that can be put together: some unit is lost.
    """
    wanted = {unit for units in needs.values() for unit in units}
    at: dict[int, set[int]] = {unit: set() for unit in wanted}
    for inventory in inventories.values():
        for unit, versions in inventory.items():
            if unit in at:
                at[unit].update(versions)
    common = set.intersection(*at.values()) if at else set()
    if not common:
        lost = min(at, key=lambda unit: (len(at[unit]), unit))
        raise EngineError(
            f"unit {lost} is held by no rank that is left, at no version that the others have: "
            "keep more copies, or checkpoints on disk (checkpoint_every)"
        )
    version, sent, transfers = max(common), dict.fromkeys(inventories, 0), []
    for member in sorted(needs):
        for unit in sorted(needs[member]):
            if version in inventories[member].get(unit, ()):
                continue
            sources = [other for other in inventories if version in inventories[other].get(unit, ())]
            source = min(sources, key=lambda other: (sent[other], other))
            sent[source] += 1
            transfers.append(Transfer(unit, source, member))
    return version, transfers


def even(units: int, members: Sequence[int]) -> tuple[Segment, ...]:
    """Share out the units of a chain among members in order, as equal as they come; the ends count as half a unit."""
    if len(members) > units - 2:
        raise RecipeError(f"{len(members)} ranks are to hold {units - 2} blocks: at most one rank for each block")
    blocks, first, segments = units - 2, 0, []
    for place, member in enumerate(members):
        held = blocks // len(members) + (place < blocks % len(members))
        last = first + held + (place == 0) + (place == len(members) - 1)
        segments.append(Segment(member, first, last))
        first = last
    return tuple(segments)
