"""Where requests wait whose pages others need: their keys and values are kept in another tier, or computed again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mycel.generation.memory import Memory


class Aside:
    """Keys and values of requests set aside, up to a number of bytes.

    Parameters
    ----------
    limit : int
        Bytes; what does not fit is dropped and computed again.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._kept: dict[int, list[Tensor]] = {}

    def put(self, sequence: int, memory: Memory, table: Sequence[int]) -> bool:
        """Copy a table's pages; False when there is no room for them."""
        content = memory.copy_out(table)
        size = _bytes(content)
        if self.bytes + size > self.limit:
            return False
        self._kept[sequence] = content
        self.bytes += size
        return True

    def take(self, sequence: int, memory: Memory, table: Sequence[int]) -> None:
        """Copy what was kept into new pages, and keep it no longer."""
        content = self._kept.pop(sequence)
        self.bytes -= _bytes(content)
        memory.copy_in(table, content)

    def drop(self, sequence: int) -> None:
        """Keep a sequence's content no longer."""
        content = self._kept.pop(sequence, None)
        if content is not None:
            self.bytes -= _bytes(content)


def _bytes(content: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in content)
