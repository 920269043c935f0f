"""Counts every serialised byte, by node, direction and purpose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, get_args

from mycel.errors import RunError

Direction = Literal["up", "down"]
Key = tuple[int, str, str]


class Meter:
    """A ledger of ``len(frame)``: nothing is estimated, so totals are what a wire would have carried.

    ``up`` is from a node to the coordinator, ``down`` the other way.
    """

    def __init__(self) -> None:
        self._bytes: Counter[Key] = Counter()
        self._frames: Counter[Key] = Counter()

    def count(self, node: int, direction: Direction, purpose: str, size: int) -> None:
        """Enter one frame of ``size`` bytes."""
        if direction not in get_args(Direction):
            raise ValueError(f"direction {direction!r} is neither 'up' nor 'down'")
        if size < 0:
            raise ValueError(f"a frame of {size} bytes cannot be counted")
        self._bytes[node, direction, purpose] += size
        self._frames[node, direction, purpose] += 1

    def total(self, direction: Direction | None = None, node: int | None = None, purpose: str | None = None) -> int:
        """Bytes over all frames, or over those of one direction, node or purpose."""
        return _sum(self._bytes, (node, direction, purpose))

    def frames(self, direction: Direction | None = None, node: int | None = None, purpose: str | None = None) -> int:
        """Frames, all or of one direction, node or purpose."""
        return _sum(self._frames, (node, direction, purpose))

    def snapshot(self) -> list[list[int | str]]:
        """Rows of node, direction, purpose, bytes and frames, sorted; ready for JSON."""
        return [[*key, self._bytes[key], self._frames[key]] for key in sorted(self._bytes)]

    def restore(self, snapshot: Sequence[Sequence[Any]]) -> None:
        """Replace everything counted by what ``snapshot`` says."""
        sizes: Counter[Key] = Counter()
        frames: Counter[Key] = Counter()
        for row in snapshot:
            if not _sound(row):
                raise RunError(f"a row of the byte ledger reads {str(row)[:80]}: damaged; start the run afresh")
            node, direction, purpose, size, number = row
            sizes[node, direction, purpose] += size
            frames[node, direction, purpose] += number
        self._bytes, self._frames = sizes, frames


def _sum(counter: Counter[Key], wanted: tuple[int | None, str | None, str | None]) -> int:
    return sum(
        size
        for key, size in counter.items()
        if all(want is None or want == have for want, have in zip(wanted, key, strict=True))
    )


def _sound(row: Sequence[Any]) -> bool:
    return (
        isinstance(row, (list, tuple))
        and [type(cell) for cell in row] == [int, str, str, int, int]
        and row[1] in get_args(Direction)
        and row[3] >= 0
        and row[4] >= 0
    )
