"""Weights through a sliding window: a few blocks are in memory, the next are read while one is computed."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from mycel.errors import ModelError
from mycel.models.anatomy import anatomy, skeleton
from mycel.models.cut import Cut, fill, read_config, source_of
from mycel.models.shards import Shards

Weights = dict[str, Tensor]
M_MMAP_THRESHOLD = -3  # of malloc.h


class Window:
    """A model some of whose blocks are in memory: each is read before it computes and let go behind it.

    Whoever runs the blocks - whole, shared out inside, or as a peer's segment - need not know of it.

    Parameters
    ----------
    folder : Path
        In Hugging Face's format.
    window : int
        Blocks in memory, the one that computes included; at least 2 lets reading and computing overlap.
    embed, head : bool
        Whether these ends are held, always in memory.
    first, last : int
        The blocks that are run here; all by default.
    held : int
        First blocks that stay in memory once they were read.

    Attributes
    ----------
    cut : Cut
        The model, whose blocks have weights only while they are in the window.
    prepare : callable
        Given a block's index and the weights that were read, by name within the block; returns what is to be kept.
    reads : int
        Blocks read so far.
    """

    def __init__(
        self,
        folder: Path,
        window: int = 2,
        embed: bool = True,
        head: bool = True,
        first: int = 0,
        last: int | None = None,
        held: int = 0,
    ) -> None:
        if window < 1:
            raise ModelError(f"a window of {window} blocks computes nothing: at least 1 is needed")
        _return_memory()
        config = read_config(folder)
        parts, model = anatomy(config), skeleton(config)
        last = parts.depth if last is None else last
        self._shards = Shards.of(folder)
        sources = self._shards.sources(model)
        ends = {name: source_of(sources, parts, name, folder) for name in parts.end_weights(embed, head)}
        fill(model, parts, self._shards, ends, torch.float32)
        self.cut = Cut(model, parts, first, last, embed, head)
        self.window = min(window, last - first)
        self._stays = set(range(first, last)) if self.window == last - first else set(range(first, first + held))
        self._names = {
            index: {name: source_of(sources, parts, name, folder) for name in parts.block_weights(index)}
            for index in range(first, last)
        }
        self.prepare: Callable[[int, Weights], Weights] = lambda index, weights: weights
        self.reads = 0
        self._thread = ThreadPoolExecutor(1)
        self._coming: dict[int, Future[Weights]] = {}
        for index in range(first, last):
            block = self.cut.block(index)
            block.register_forward_pre_hook(lambda *_, index=index: self._enter(index))
            block.register_forward_hook(lambda *_, index=index: self._leave(index))

    def close(self) -> None:
        """Stop reading."""
        self._thread.shutdown(cancel_futures=True)

    def _enter(self, index: int) -> None:
        first, count = self.cut.first, self.cut.last - self.cut.first
        # The first blocks of the next pass are read while the last of this one compute.
        for ahead in range(index - first, index - first + self.window):
            self._fetch(first + ahead % count)
        if index in self._coming:
            put(self.cut.block(index), self._coming.pop(index).result())

    def _leave(self, index: int) -> None:
        if index not in self._stays:
            put(self.cut.block(index), None)

    def _fetch(self, index: int) -> None:
        if index not in self._coming and next(self.cut.block(index).parameters()).is_meta:
            self._coming[index] = self._thread.submit(self._read, index)

    def _read(self, index: int) -> Weights:
        names = self._names[index]
        found = self._shards.load(set(names.values()), torch.float32)
        self.reads += 1
        start = len(self.cut.parts.block_path(index)) + 1
        return self.prepare(index, {name[start:]: found[source] for name, source in names.items()})


def _return_memory() -> None:
    """Have the C library give large pieces back when they are let go, rather than keep them for later."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 16)


def put(block: nn.Module, weights: Weights | None) -> None:
    """Give a block its weights, or take them away so that they cost no memory."""
    for path, module in block.named_modules():
        for leaf, parameter in module._parameters.items():
            name = f"{path}.{leaf}".lstrip(".")
            if parameter is None:
                continue
            tensor = torch.empty_like(parameter, device="meta") if weights is None else weights[name]
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
