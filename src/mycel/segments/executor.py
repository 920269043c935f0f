"""The pipeline over peers for an engine that computes in a thread of its own: pieces in, logits out."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mycel.segments.client import SwarmModel, Turn, all_of
from mycel.segments.session import Session

Found = TypeVar("Found")


class Piece(Protocol):
    """Consecutive tokens of one sequence: what this executor reads of an engine's pieces."""

    @property
    def sequence(self) -> int:
        """Identity."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """What to compute, at positions ``start`` and on."""

    @property
    def start(self) -> int:
        """Place of the first token."""

    @property
    def wanted(self) -> int:
        """Number of last tokens whose logits are wanted."""


class Pipeline:
    """Computes pieces on the peers of a swarm; sequences' keys and values stay with the peers.

    Parameters
    ----------
    model : SwarmModel
        Opened in ``loop``.
    loop : asyncio.AbstractEventLoop
        Runs in another thread than the one that calls ``run``.
    """

    memory: Any = None  # an engine that has pages puts them here; here are none
    position_bytes = 0

    def __init__(self, model: SwarmModel, loop: asyncio.AbstractEventLoop) -> None:
        self.model, self.loop = model, loop
        self.vocabulary, self.context = model.vocabulary, model.context
        self.sessions: dict[int, Session] = {}
        self._forgetting: set[Future[None]] = set()

    def reserve(self, pages: int, size: int) -> None:
        """Keep nothing here: peers make room as sessions grow."""

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Return logits ``[sum of wanted, vocabulary]``, pieces in the given order."""
        turns = [
            Turn(self.sessions.setdefault(piece.sequence, Session()), piece.tokens, piece.start, piece.wanted)
            for piece in pieces
        ]
        # Two halves in flight keep a chain of peers busy: while one half is with the second peer, the other is with
        # the first.
        if len(turns) < 4:
            return self._wait(self.model.step(turns))
        middle = len(turns) // 2
        return self._wait(self._halves(turns[:middle], turns[middle:]))

    def forget(self, sequence: int) -> None:
        """Have the peers drop what they keep for a sequence; the caller does not wait for them."""
        session = self.sessions.pop(sequence, None)
        if session is not None:
            told = asyncio.run_coroutine_threadsafe(self.model.forget([session]), self.loop)
            self._forgetting.add(told)
            told.add_done_callback(self._forgetting.discard)

    def close(self) -> None:
        """Forget everything; the model itself stays open."""
        for sequence in list(self.sessions):
            self.forget(sequence)
        wait(list(self._forgetting))

    async def _halves(self, first: list[Turn], second: list[Turn]) -> Tensor:
        return torch.cat(await all_of(self.model.step(first), self.model.step(second)))

    def _wait(self, work: Coroutine[Any, Any, Found]) -> Found:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()
