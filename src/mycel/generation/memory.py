"""Key-value store, tensors: what attention reads and writes, and the room to which it is moved aside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Heads and width of one layer's keys, and width of its values."""

    heads: int
    key_width: int
    value_width: int

    @property
    def bytes(self) -> int:
        """Bytes of one position in float32."""
        return 4 * self.heads * (self.key_width + self.value_width)


class Memory:
    """Keys and values of every layer in pages.

    Parameters
    ----------
    shapes : sequence of Shape
        By layer.
    pages, size : int
        Number of pages and positions in each.
    """

    def __init__(self, shapes: Sequence[Shape], pages: int, size: int) -> None:
        self.pages, self.size = pages, size
        slots = pages * size
        self.keys = [torch.empty(slots, shape.heads, shape.key_width) for shape in shapes]
        self.values = [torch.empty(slots, shape.heads, shape.value_width) for shape in shapes]

    def write(self, layer: int, slots: Tensor | slice, keys: Tensor, values: Tensor) -> None:
        """Store keys and values of shape (positions, heads, width) in ``slots``."""
        self.keys[layer][slots] = keys
        self.values[layer][slots] = values

    def read(self, layer: int, where: Tensor | slice, length: int) -> tuple[Tensor, Tensor]:
        """Return the first ``length`` positions of a table, each of shape (length, heads, width).

        ``where`` is a slice of slots where the table's pages lie one after another (nothing is copied then), or the
        pages' numbers.
        """
        keys, values = self.keys[layer], self.values[layer]
        if isinstance(where, slice):
            return keys[where], values[where]
        return self._gather(keys, where, length), self._gather(values, where, length)

    def where(self, table: Sequence[int], length: int) -> Tensor | slice:
        """Say how ``read`` finds a table's first ``length`` positions."""
        first, count = table[0], -(-length // self.size)
        if all(page == first + index for index, page in enumerate(table[:count])):
            return slice(first * self.size, first * self.size + length)
        return torch.tensor(table[:count])

    def slots(self, table: Sequence[int], start: int, end: int) -> list[int]:
        """Return the slots of positions ``start`` to ``end - 1``."""
        return [table[at // self.size] * self.size + at % self.size for at in range(start, end)]

    def bytes_of(self, pages: int) -> int:
        """Return the bytes of this many pages in all layers."""
        return pages * sum(
            self._paged(tensor).shape[1] * tensor.element_size() for tensor in (*self.keys, *self.values)
        )

    def copy_out(self, table: Sequence[int]) -> list[Tensor]:
        """Return a copy of what a table's pages hold."""
        pages = torch.tensor(table, dtype=torch.int64)
        return [self._paged(tensor).index_select(0, pages) for tensor in (*self.keys, *self.values)]

    def copy_in(self, table: Sequence[int], content: Sequence[Tensor]) -> None:
        """Put back what ``copy_out`` returned, into pages of as many positions."""
        pages = torch.tensor(table, dtype=torch.int64)
        for tensor, stored in zip((*self.keys, *self.values), content, strict=True):
            self._paged(tensor).index_copy_(0, pages, stored)

    def _paged(self, tensor: Tensor) -> Tensor:
        return tensor.view(self.pages, -1)

    def _gather(self, tensor: Tensor, pages: Tensor, length: int) -> Tensor:
        return self._paged(tensor).index_select(0, pages).view(-1, *tensor.shape[1:])[:length]
