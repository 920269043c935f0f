"""Where requests wait whose pages others need: their keys and values are kept in another tier, or computed again.

A copy takes time in which the engine could compute, so it may be made beside the computing, by a thread of its own:
out, while the request still holds its pages, which are given back when the copy is there; and back in, into pages that
the request holds already, before it is scheduled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from mycel.generation.memory import Memory

Found = TypeVar("Found")


class Aside:
    """Keys and values of requests set aside, up to a number of bytes.

    Parameters
    ----------
    limit : int
        Bytes; what does not fit is dropped and computed again.
    background : bool
        Whether early copies are made by a thread; otherwise where they are asked for, as a simulation needs it.
    """

    def __init__(self, limit: int, background: bool = True) -> None:
        self.limit, self.background = limit, background
        self.bytes = 0
        self._kept: dict[int, list[Tensor]] = {}
        self._sizes: dict[int, int] = {}
        self._leaving: dict[int, Future[list[Tensor]]] = {}
        self._coming: dict[int, Future[None]] = {}
        self._thread: ThreadPoolExecutor | None = None

    def put(self, sequence: int, memory: Memory, table: Sequence[int]) -> bool:
        """Copy a table's pages, or wait for the copy that is under way; False when there is no room for them."""
        if sequence not in self._leaving:
            content = memory.copy_out(table)
            if not self._reserve(sequence, sum(tensor.nbytes for tensor in content)):
                return False
            self._kept[sequence] = content
        else:
            self._kept[sequence] = self._leaving.pop(sequence).result()
        return True

    def begin(self, sequence: int, memory: Memory, table: Sequence[int]) -> bool:
        """Begin to copy pages, which stay as they are until ``left`` or ``stay``; False when there is no room."""
        if not self._reserve(sequence, memory.bytes_of(len(table))):
            return False
        pages = list(table)
        self._leaving[sequence] = self._submit(lambda: memory.copy_out(pages))
        return True

    def left(self) -> list[int]:
        """Return whose copies were finished since: their pages may be given back."""
        done = [sequence for sequence, future in self._leaving.items() if future.done()]
        for sequence in done:
            self._kept[sequence] = self._leaving.pop(sequence).result()
        return done

    def stay(self, sequence: int) -> None:
        """Give up a copy that is under way: its pages are used after all."""
        self._leaving.pop(sequence).result()
        self.bytes -= self._sizes.pop(sequence)

    def take(self, sequence: int, memory: Memory, table: Sequence[int]) -> None:
        """Copy what was kept into new pages, and keep it no longer."""
        memory.copy_in(table, self._give(sequence))

    def fetch(self, sequence: int, memory: Memory, table: Sequence[int]) -> None:
        """Begin to copy what was kept into new pages; ``arrive`` before they are used."""
        content, pages = self._give(sequence), list(table)
        self._coming[sequence] = self._submit(lambda: memory.copy_in(pages, content))

    def arrived(self) -> list[int]:
        """Return whose pages are complete since."""
        done = [sequence for sequence, future in self._coming.items() if future.done()]
        for sequence in done:
            self.arrive(sequence)
        return done

    def arrive(self, sequence: int) -> None:
        """Wait until a sequence's pages are complete."""
        self._coming.pop(sequence).result()

    def drop(self, sequence: int) -> None:
        """Keep a sequence's content no longer; nothing touches its pages afterwards."""
        if sequence in self._leaving:
            self.stay(sequence)
        if sequence in self._coming:
            self.arrive(sequence)
        if sequence in self._kept:
            self._give(sequence)

    def _give(self, sequence: int) -> list[Tensor]:
        self.bytes -= self._sizes.pop(sequence)
        return self._kept.pop(sequence)

    def _reserve(self, sequence: int, size: int) -> bool:
        if self.bytes + size > self.limit:
            return False
        self._sizes[sequence] = size
        self.bytes += size
        return True

    def _submit(self, work: Callable[[], Found]) -> Future[Found]:
        if not self.background:
            done: Future[Found] = Future()
            done.set_result(work())
            return done
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))

        def quietly() -> Found:
            with torch.inference_mode():
                return work()

        return self._thread.submit(quietly)
