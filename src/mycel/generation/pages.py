"""Key-value store, bookkeeping: pages of fixed length, shared prefixes, and never a page too many.

A sequence owns a table of pages; page ``i`` holds the keys and values of positions ``i * size`` to
``(i + 1) * size - 1``. A full page may be shared by every sequence that begins with the same tokens under the same
adapter. Source: Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention";
prefixes are compared as tokens, not as hashes, so that two never meet by chance.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from mycel.errors import GenerationError

Key = tuple[int, Hashable]  # (identity of the page before, this page's tokens; for a first page also the adapter)


class PagePool:
    """Who holds which page.

    Parameters
    ----------
    count : int
        Number of pages.
    size : int
        Positions in a page.
    share : bool
        Whether prefixes are kept and shared.
    """

    def __init__(self, count: int, size: int, share: bool = True) -> None:
        if count < 1 or size < 1:
            raise GenerationError(f"the key-value store has {count} pages of {size} positions: give it more memory")
        self.count, self.size, self.share = count, size, share
        # Free pages in ascending order from the end: neighbours in a table are often neighbours in memory.
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._idle: OrderedDict[int, None] = OrderedDict()  # published pages that nobody holds, oldest use first
        self._page_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._identity: dict[int, int] = {}
        self._identities = 0

    @property
    def available(self) -> int:
        """Pages that can be taken now."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Pages that some sequence holds."""
        return self.count - self.available

    def pages_for(self, length: int) -> int:
        """Return how many pages ``length`` positions need."""
        return -(-length // self.size)

    def take(self, count: int) -> list[int]:
        """Take ``count`` pages; prefixes that nobody uses make room, the longest unused first.

        Raises
        ------
        GenerationError
            When fewer are available; nothing is taken then.
        """
        if count > self.available:
            raise GenerationError(f"{count} pages of the key-value store are wanted and {self.available} are available")
        taken = []
        for _ in range(count):
            if not self._free:
                page, _ = self._idle.popitem(last=False)
                self._unpublish(page)
                self._free.append(page)
            page = self._free.pop()
            self._holders[page] = 1
            taken.append(page)
        return taken

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back; a published page stays readable until its room is needed."""
        for page in reversed(pages):
            if self._holders[page] < 1:
                raise GenerationError(f"page {page} was given back twice")
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def find(self, tokens: Sequence[int], adapter: str) -> list[int]:
        """Take the published pages that hold the beginning of ``tokens``, leaving at least one token to compute."""
        found: list[int] = []
        if not self.share:
            return found
        before, start = -1, 0
        while start + self.size < len(tokens):
            page = self._page_of.get(self._key(before, tokens, start, adapter))
            if page is None:
                break
            if self._holders[page] == 0:
                del self._idle[page]
            self._holders[page] += 1
            found.append(page)
            before, start = self._identity[page], start + self.size
        return found

    def publish(self, pages: Sequence[int], tokens: Sequence[int], adapter: str, start: int) -> None:
        """Offer the full pages from position ``start`` on for sharing; ``tokens`` are those computed so far."""
        if not self.share:
            return
        for index in range(start // self.size, len(tokens) // self.size):
            page = pages[index]
            if page in self._key_of:
                continue
            # A page follows what stands before it in the *index*: its table may hold its own copy of that content.
            before = self._chain(tokens, adapter, index)
            if before is None:
                return
            key = self._key(before, tokens, index * self.size, adapter)
            if key in self._page_of:
                continue
            self._page_of[key], self._key_of[page] = page, key
            self._identities += 1
            self._identity[page] = self._identities

    def unshare(self) -> None:
        """Offer nothing any more of what was published so far."""
        for page in list(self._key_of):
            self._unpublish(page)
        self._free += self._idle
        self._idle.clear()

    def _chain(self, tokens: Sequence[int], adapter: str, index: int) -> int | None:
        before = -1
        for earlier in range(index):
            page = self._page_of.get(self._key(before, tokens, earlier * self.size, adapter))
            if page is None:
                return None
            before = self._identity[page]
        return before

    def _key(self, before: int, tokens: Sequence[int], start: int, adapter: str) -> Key:
        content = tuple(tokens[start : start + self.size])
        return (before, (adapter, content) if before < 0 else content)

    def _unpublish(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]
        del self._identity[page]
