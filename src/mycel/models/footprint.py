"""How much memory a piece of work takes beyond what was there: the bytes of the tensors that it makes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Footprint(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, inside the block, every tensor that an operation makes until its memory is given back.

    Attributes
    ----------
    peak : int
        Most bytes alive at once; workspaces within one operation are not seen.
    now : int
        Bytes that are alive.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self.now = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out the operation and count what came out of it."""
        for tensor in _tensors((args, kwargs)):
            self._note(tensor, 0)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._note(tensor, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _note(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = size
            self.now += size
            # Addresses are used again once memory is given back, so each is forgotten with its storage.
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, address: int) -> None:
        self.now -= self._known.pop(address, 0)


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most bytes that tensors made by ``work`` hold at once."""
    with Footprint() as footprint:
        work()
    peak: int = footprint.peak
    return peak


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        for part in tree:
            yield from _tensors(part)
