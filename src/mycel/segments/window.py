"""Weights through a sliding window: a few blocks are in memory, the next are read while one is computed."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Cache

from mycel.errors import ModelError
from mycel.models.anatomy import anatomy, skeleton
from mycel.models.cut import Cut, fill, read_config, source_of
from mycel.models.shards import Shards

Weights = dict[str, Tensor]
M_MMAP_THRESHOLD = -3  # of malloc.h


class Window:
    """All blocks of a model, ``window`` of them in memory at a time.

    Parameters
    ----------
    folder : Path
        In Hugging Face's format.
    window : int
        Blocks in memory, the one that computes included; at least 2 lets reading and computing overlap.
    embed, head : bool
        Whether these ends are held, always in memory.

    Attributes
    ----------
    cut : Cut
        The model, whose blocks have weights only while they are in the window.
    prepare : callable
        Given a block's index and the weights that were read, by name within the block; returns what is to be kept.
    reads : int
        Blocks read so far.
    """

    def __init__(self, folder: Path, window: int = 2, embed: bool = True, head: bool = True) -> None:
        if window < 1:
            raise ModelError(f"a window of {window} blocks computes nothing: at least 1 is needed")
        _return_memory()
        config = read_config(folder)
        parts, model = anatomy(config), skeleton(config)
        self.window, self._shards = window, Shards.of(folder)
        sources = self._shards.sources(model)
        ends = {name: source_of(sources, parts, name, folder) for name in parts.end_weights(embed, head)}
        fill(model, parts, self._shards, ends, torch.float32)
        self.cut = Cut(model, parts, 0, parts.depth, embed, head)
        self._names = [
            {name: source_of(sources, parts, name, folder) for name in parts.block_weights(index)}
            for index in range(parts.depth)
        ]
        self.prepare: Callable[[int, Weights], Weights] = lambda index, weights: weights
        self.reads = 0
        self._thread = ThreadPoolExecutor(1)
        self._coming: dict[int, Future[Weights]] = {}
        self._caches: list[Cache] = []
        self.fresh()

    def fresh(self) -> None:
        """Forget all positions."""
        self._caches = [self.cut.new_cache(index, index + 1) for index in range(self.cut.depth)]

    def run(self, hidden_BTD: Tensor) -> Tensor:
        """Run all blocks on new positions; the first blocks of the next pass are read meanwhile."""
        depth = self.cut.depth
        for index in range(depth):
            for ahead in range(index, index + min(self.window, depth)):
                self._fetch(ahead % depth)
            put(self.cut.block(index), self._coming[index].result())
            hidden_BTD = self.cut.run(hidden_BTD, index, index + 1, self._caches[index])
            if self.window < depth:
                del self._coming[index]
                put(self.cut.block(index), None)
        return hidden_BTD

    def close(self) -> None:
        """Stop reading."""
        self._thread.shutdown(cancel_futures=True)

    def _fetch(self, index: int) -> None:
        if index not in self._coming:
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
