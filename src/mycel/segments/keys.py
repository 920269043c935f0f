"""Keys and values of many sessions in one slab, so that rows of unequal length are computed together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from mycel.errors import EngineError

START = 64  # positions that a slab has room for at first


class Slab:
    """Keys and values of all sessions that a segment serves, one slot each.

    Parameters
    ----------
    sessions : int
        Most sessions; the one longest unused makes room.
    positions : int
        Most positions of a session.
    """

    def __init__(self, sessions: int = 64, positions: int = 4096) -> None:
        self.most, self.positions = sessions, positions
        self.slots: dict[str, int] = {}  # in the order of their last use
        self.lengths: dict[str, int] = {}
        self.turns: dict[str, int] = {}  # of the latest step of each
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._free: list[int] = []

    def enter(self, session: str, start: int, turn: int = 0) -> None:
        """Find a session that goes on at ``start`` with its step ``turn``; what it holds beyond is taken back.

        Raises
        ------
        LookupError
            When not all positions before ``start`` are held.
        """
        if start and (session not in self.slots or self.lengths[session] < start):
            raise LookupError(session)
        if session not in self.slots:
            if len(self.slots) >= self.most:
                self.drop(next(iter(self.slots)))
            self.slots[session] = self._free.pop() if self._free else len(self.slots)
        self.slots[session] = self.slots.pop(session)
        self.lengths[session], self.turns[session] = start, turn

    def drop(self, session: str) -> None:
        """Forget a session."""
        if session in self.slots:
            self._free.append(self.slots.pop(session))
            del self.lengths[session], self.turns[session]

    def rows(self, sessions: list[str], count: int, first: int) -> Rows:
        """Return a cache in which blocks from ``first`` on see these sessions, each with ``count`` new positions."""
        longest = max(self.lengths[session] for session in sessions) + count
        if longest > self.positions:
            raise EngineError(f"a session of {longest:,} positions; at most {self.positions:,} are held here")
        return Rows(self, sessions, count, first)

    def store(self, layer: int, keys: Tensor, values: Tensor, rows: Rows) -> None:
        """Write new keys and values, of shape (rows, heads, new, width), where the rows say."""
        self._grow(layer, keys, values, rows.top, rows.longest)
        for store, new in zip(self.layers[layer], (keys, values), strict=True):
            if rows.alone:
                store[rows.top - 1, :, rows.past : rows.longest] = new[0]
            else:
                store[rows.slots[:, None], :, rows.places] = new.transpose(1, 2)

    def _grow(self, layer: int, keys: Tensor, values: Tensor, slots: int, longest: int) -> None:
        held = self.layers.get(layer)
        if held is not None and held[0].shape[0] >= slots and held[0].shape[2] >= longest:
            return
        have = (held[0].shape[0], held[0].shape[2]) if held is not None else (0, START // 2)
        room = (max(slots, min(2 * have[0], self.most)), have[1])
        while room[1] < longest:
            room = (room[0], 2 * room[1])
        grown = []
        for place, like in enumerate((keys, values)):
            store = like.new_zeros(room[0], like.shape[1], room[1], like.shape[3])
            if held is not None:
                store[: have[0], :, : have[1]] = held[place]
            grown.append(store)
        self.layers[layer] = (grown[0], grown[1])


class Rows(Cache):  # type: ignore[misc]
    """Sessions of a slab as a transformers cache; several rows have one new position each, padded on the right."""

    def __init__(self, slab: Slab, sessions: list[str], count: int, first: int) -> None:
        self.layers: list[Any] = []
        self.slab, self.first = slab, first
        slots = [slab.slots[session] for session in sessions]
        starts = [slab.lengths[session] for session in sessions]
        self.alone, self.top, self.past = len(slots) == 1, max(slots) + 1, max(starts)
        self.longest = self.past + count
        self.slots, self.starts = torch.tensor(slots), torch.tensor(starts)
        self.places = self.starts[:, None] + torch.arange(count)
        in_line = slots == list(range(slots[0], slots[0] + len(slots)))
        self.where: Any = slice(slots[0], slots[0] + len(slots)) if in_line else self.slots

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Write the new positions and return all, ``(rows, heads, longest, width)``."""
        layer = layer_idx + self.first  # a cut numbers its blocks from 0
        self.slab.store(layer, key_states, value_states, self)
        keys, values = self.slab.layers[layer]
        return keys[self.where, :, : self.longest], values[self.where, :, : self.longest]

    def mask(self) -> Tensor | None:
        """Return the mask of rows with one new position each: 0 where a row has a key, very low beyond."""
        if self.alone:
            return None
        beyond = torch.arange(self.longest) > self.starts[:, None]
        return torch.zeros(beyond.shape).masked_fill_(beyond, torch.finfo(torch.float32).min)[:, None, None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the positions that were there before."""
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return how many positions are seen, and where they begin."""
        return self.longest, 0
