"""A checkpoint laid out for loading: one file of aligned tensors and an index, read by several threads at once.

Source: Fu et al. 2024, ServerlessLLM. Large pieces are read straight into the block of memory that the tensors are
views of. Each reader has a run of the file and a descriptor of its own, so that the kernel sees sequential reading and
reads ahead of every one; one descriptor for all reads halves the speed. Reading past the page cache is a setting: it
spares the cache, and on disks whose host reads ahead it is slower (`benchmarks/loading.py` shows both).
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mycel.errors import ModelError

ALIGNMENT = 4096  # of every tensor and every read, as direct reading demands
PIECE = 4 << 20
INDEX = "index.json"
WEIGHTS = "tensors.bin"
MOST_INDEX = 64 << 20
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}
NAMES = {kind: name for name, kind in TYPES.items()}


def write_checkpoint(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write tensors; those that share memory are written once.

    Raises
    ------
    ModelError
        When a tensor's type has no place in the format.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {}
    places: dict[tuple[object, ...], int] = {}
    end = 0
    with (folder / WEIGHTS).open("wb") as file:
        for name, tensor in tensors.items():
            if tensor.dtype not in NAMES:
                raise ModelError(f"the tensor {name!r} is of type {tensor.dtype}, which a checkpoint does not hold")
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            if key not in places:
                places[key] = end
                file.seek(end)
                file.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
                end += _aligned(tensor.nbytes)
            index[name] = [places[key], NAMES[tensor.dtype], list(tensor.shape)]
        file.truncate(end)
    (folder / INDEX).write_text(json.dumps({"bytes": end, "tensors": index}), encoding="utf-8")


class Loader:
    """Loads checkpoints into memory of its own, which the next load of no greater size takes over when asked to.

    Parameters
    ----------
    threads : int
        Readers at work at once; two keep a disk busy while the kernel clears new memory for one of them.
    direct : bool
        Whether to read past the page cache, where the file system lets one.
    """

    def __init__(self, threads: int = 2, direct: bool = False) -> None:
        self.threads, self.direct = threads, direct
        self._block: mmap.mmap | None = None

    def load(self, folder: Path, reuse: bool = False) -> dict[str, Tensor]:
        """Return the tensors, views of one block of owned memory.

        Parameters
        ----------
        folder : Path
            Written by ``write_checkpoint``.
        reuse : bool
            Take the block of the last load: what it returned changes then, and the kernel need not clear new memory.

        Raises
        ------
        ModelError
            When the checkpoint is missing, damaged or lying.
        """
        size, index = _read_index(folder)
        block = self._block
        if not reuse or block is None or len(block) < size:
            block = mmap.mmap(-1, max(size, ALIGNMENT))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                block.madvise(mmap.MADV_HUGEPAGE)
        self._block = block
        self._read(folder / WEIGHTS, memoryview(block), size)
        whole = torch.frombuffer(block, dtype=torch.uint8)
        found = {}
        for name, (offset, kind, shape) in index.items():
            dtype = TYPES[kind]
            length = math.prod(shape) * dtype.itemsize
            found[name] = whole[offset : offset + length].view(dtype).view(shape)
        return found

    def _read(self, path: Path, block: memoryview, size: int) -> None:
        share = max(PIECE, _aligned(-(-size // self.threads)))
        runs = [(start, min(start + share, size)) for start in range(0, size, share)]
        with ThreadPoolExecutor(self.threads) as readers:
            list(readers.map(lambda run: self._read_run(path, block, *run), runs))

    def _read_run(self, path: Path, block: memoryview, start: int, end: int) -> None:
        file = self._open(path)
        try:
            while start < end:
                got = os.preadv(file, [block[start : min(start + PIECE, end)]], start)
                if got <= 0:
                    raise ModelError(f"{path} ends at byte {start} of {end}: write the checkpoint again")
                start += got
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
        finally:
            os.close(file)

    def _open(self, path: Path) -> int:
        try:
            if self.direct and hasattr(os, "O_DIRECT"):
                try:
                    return os.open(path, os.O_RDONLY | os.O_DIRECT)
                except OSError:  # some file systems have no direct reading
                    pass
            return os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ModelError(f"{path} cannot be opened: {error}") from error


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _read_index(folder: Path) -> tuple[int, dict[str, tuple[int, str, list[int]]]]:
    """Read and check the index against the file: no tensor may lie outside it."""
    try:
        path = folder / INDEX
        if path.stat().st_size > MOST_INDEX:
            raise ValueError("too large")
        content = json.loads(path.read_text(encoding="utf-8"))
        size, listed = content["bytes"], content["tensors"]
        held = (folder / WEIGHTS).stat().st_size
        if type(size) is not int or not 0 <= size == held:
            raise ValueError(f"it tells of {size!r} bytes and the file has {held}")
        index = {}
        for name, (offset, kind, shape) in listed.items():
            whole = all(type(number) is int and number >= 0 for number in (offset, *shape))
            if not whole or kind not in TYPES or offset % ALIGNMENT or len(shape) > 8:
                raise ValueError(f"the entry {name[:80]!r} is unsound")
            if offset + math.prod(shape) * TYPES[kind].itemsize > size:
                raise ValueError(f"{name[:80]!r} reaches beyond the file")
            index[name] = (offset, kind, shape)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"the checkpoint in {folder} cannot be read: {error}; write it again") from error
    return size, index
