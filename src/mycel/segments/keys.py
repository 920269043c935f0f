"""Keys and values of many sessions in one slab, so that rows of unequal length are computed together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache

from mycel.errors import EngineError

START = 64  # positions that a slab has room for at first


class Entering(Protocol):
    """New positions of a session, ``turn`` its latest step's number."""

    @property
    def session(self) -> str:
        """Identity."""

    @property
    def start(self) -> int:
        """Place of the first; what the session holds beyond is taken back."""

    @property
    def turn(self) -> int:
        """Number of this step among the session's."""


class Slab:
    """Keys and values of all sessions that a segment serves, one slot each.

    Parameters
    ----------
    sessions : int
        Most sessions; the one longest unused makes room.
    positions : int
        Most positions of a session.
    memory : int
        Bytes that one block may take; 0: no limit.
    """

    def __init__(self, sessions: int = 256, positions: int = 4096, memory: int = 0) -> None:
        self.most, self.positions, self.memory = sessions, positions, memory
        self.slots: dict[str, int] = {}  # in the order of their last use
        self.lengths: dict[str, int] = {}
        self.turns: dict[str, int] = {}  # of the latest step of each
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._free: list[int] = []

    def enter(self, rows: Sequence[Entering]) -> None:
        """Find the sessions of a batch, or make room for new ones.

        Raises
        ------
        LookupError
            When not all positions before a session's start are held.
        EngineError
            When there are more rows than sessions that can be held.
        """
        if len(rows) > self.most:
            raise EngineError(f"{len(rows)} sessions in one step; at most {self.most} are held here")
        for row in rows:
            if row.start and (row.session not in self.slots or self.lengths[row.session] < row.start):
                raise LookupError(row.session)
        for row in rows:  # first those that are known: none of them is to make room for the others
            if row.session in self.slots:
                self.slots[row.session] = self.slots.pop(row.session)
        for row in rows:
            if row.session not in self.slots:
                if len(self.slots) >= self.most:
                    self.drop(next(iter(self.slots)))
                self.slots[row.session] = self._free.pop() if self._free else len(self.slots)
            self.lengths[row.session], self.turns[row.session] = row.start, row.turn

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
        self._make_room(sessions, longest)
        return Rows(self, sessions, count, first)

    def store(self, layer: int, keys: Tensor, values: Tensor, rows: Rows) -> None:
        """Write new keys and values, of shape (rows, heads, new, width), where the rows say."""
        self._grow(layer, keys, values, rows.top, rows.longest)
        for store, new in zip(self.layers[layer], (keys, values), strict=True):
            if rows.alone:
                store[rows.top - 1, :, rows.past : rows.longest] = new[0]
            else:
                store[rows.slots[:, None], :, rows.places] = new.transpose(1, 2)

    def _room(self) -> int:
        """Return how many positions of all slots together a block may take; 0: no limit."""
        pair = next(iter(self.layers.values()), None)
        if not self.memory or pair is None:
            return 0
        return self.memory // sum(part.shape[1] * part.shape[3] * part.element_size() for part in pair)

    def _extent(self, longest: int) -> tuple[int, int]:
        """Return how many slots are taken, and how many positions the longest session will have."""
        return max(self.slots.values()) + 1, max(longest, *self.lengths.values())

    def _make_room(self, sessions: list[str], longest: int) -> None:
        """Let go of sessions, the longest unused first, until these fit; the others move together."""
        room = self._room()
        if not room or math.prod(self._extent(longest)) <= room:
            return
        for session in [each for each in self.slots if each not in sessions]:
            if len(self.slots) * self._extent(longest)[1] <= room:
                break
            self.drop(session)
        if len(self.slots) * self._extent(longest)[1] > room:
            raise EngineError(f"{len(self.slots)} sessions of {longest:,} positions: {room:,} have room here")
        stored = min(len(keys) for keys, _ in self.layers.values())
        order = sorted(self.slots, key=lambda each: self.slots[each] >= stored)  # the newest have nothing here yet
        kept = torch.tensor([self.slots[each] for each in order if self.slots[each] < stored], dtype=torch.int64)
        held = max(self.lengths.values())
        for layer, (keys, values) in self.layers.items():
            self.layers[layer] = keys[kept, :, :held], values[kept, :, :held]
        places = {session: place for place, session in enumerate(order)}
        self.slots, self._free = {session: places[session] for session in self.slots}, []

    def _grow(self, layer: int, keys: Tensor, values: Tensor, slots: int, longest: int) -> None:
        held = self.layers.get(layer)
        have = (held[0].shape[0], held[0].shape[2]) if held is not None else (0, START // 2)
        if have[0] >= slots and have[1] >= longest:
            return
        count = have[0] if have[0] >= slots else max(slots, min(2 * have[0], self.most))
        length = have[1] if have[1] >= longest else max(longest, 2 * have[1])
        if (room := self._room()) and count * length > room:
            count, needed = self._extent(longest)
            length = min(length, max(needed, room // count))
        grown = []
        for place, like in enumerate((keys, values)):
            store = like.new_zeros(count, like.shape[1], length, like.shape[3])
            if held is not None:
                part = held[place][:count, :, :length]
                store[: part.shape[0], :, : part.shape[2]] = part
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
