"""What a block leaves behind for its way back: everything, its matrix products, its input, or files.

    keep        every tensor that the way back needs
    selective   products of matrices and attention are kept, what is cheap between them is computed again
    recompute   only what entered; the block is computed again
    offload     tensors go to host memory from an accelerator, from a CPU to an unnamed file, and come back when needed

Gradients are the same to the bit. An optimiser's memory can lie in files as well (``mapped``); it is read and written
through the page cache.
"""

from __future__ import annotations

import os
import tempfile
import weakref
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mycel.errors import RunError
from mycel.models.footprint import Footprint

SMALL = 1024  # bytes; a smaller tensor is not worth a file
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product")
Through = Callable[[Tensor], Tensor]


def passed(block: Through, hidden: Tensor, how: str, spill: Spill) -> Tensor:
    """Take hidden states through a block, leaving behind what ``how`` says."""
    if how == "offload":
        with spill.away(hidden.device):
            return block(hidden)
    if how in {"recompute", "selective"}:
        made: dict[str, Any] = {"context_fn": _products_kept} if how == "selective" else {}
        found: Tensor = checkpoint(block, hidden, use_reentrant=False, **made)
        return found
    return block(hidden)


def _products_kept() -> Any:
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name().partition("::")[2].partition(".")[0]
    return CheckpointPolicy.MUST_SAVE if name.startswith(PRODUCTS) else CheckpointPolicy.PREFER_RECOMPUTE


class Spill:
    """A file without a name in which tensors wait; its space is used again when none is left in it.

    Attributes
    ----------
    written : int
        Bytes so far.
    """

    def __init__(self) -> None:
        self._end = self._waiting = self.written = 0

    @cached_property
    def _file(self) -> int:
        number, name = tempfile.mkstemp(prefix="mycel-spill-")
        os.unlink(name)
        weakref.finalize(self, os.close, number)
        return number

    def away(self, device: torch.device) -> AbstractContextManager[Any]:
        """Inside the block, what autograd keeps goes away."""
        if device.type != "cpu":
            return save_on_cpu()
        return saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> Any:
        """Write a tensor; weights and small tensors stay where they are."""
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        if weight or local.numel() * local.element_size() < SMALL:
            return tensor
        content = local.detach().contiguous().view(-1).view(torch.uint8).numpy()
        self._waiting += 1  # until what is made here is gone, however it goes
        kept = _Away(self, self._end, len(content), zlib.crc32(content.data), local, tensor)
        try:
            self._write(content.data)
        except OSError as error:
            raise RunError(f"{len(content)} bytes of activations could not be written: is the disk full?") from error
        self.written += len(content)
        return kept

    def _write(self, content: memoryview) -> None:
        while content:  # the system takes at most 2 GiB at a time
            count = os.pwrite(self._file, content, self._end)
            self._end += count
            content = content[count:]

    def unpack(self, kept: Any) -> Tensor:
        """Read a tensor back; ``RunError`` when it is not what was written."""
        return kept.read() if isinstance(kept, _Away) else kept

    def read(self, offset: int, size: int, check: int) -> Tensor:
        """Return bytes of the file."""
        content, found = torch.empty(size, dtype=torch.uint8), 0
        while count := os.preadv(self._file, [content.numpy().data[found:]], offset + found):
            found += count
        if found != size or zlib.crc32(content.numpy().data) != check:
            raise RunError("activations that waited on the disk came back changed: see to the disk")
        return content

    def done(self) -> None:
        """Count a tensor that is needed no more."""
        self._waiting -= 1
        if not self._waiting:
            self._end = 0


class _Away:
    """A tensor's place in the file, and what it was."""

    def __init__(self, spill: Spill, offset: int, size: int, check: int, local: Tensor, tensor: Tensor) -> None:
        self._spill, self._place = spill, (offset, size, check)
        self._shape, self._dtype = local.shape, local.dtype
        self._whole = (
            (tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride())
            if isinstance(tensor, DTensor)
            else None
        )

    def read(self) -> Tensor:
        local = self._spill.read(*self._place).view(self._dtype).view(self._shape)
        if self._whole is None:
            return local
        mesh, placements, shape, stride = self._whole
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)

    def __del__(self) -> None:
        self._spill.done()


def left_behind(block: Through, hidden: Tensor, how: str, spill: Spill) -> int:
    """Bytes that a block's pass leaves in memory for its way back, what leaves it among them."""
    with Footprint() as footprint:
        leaving = passed(block, hidden.detach().requires_grad_(True), how, spill)
    left: int = footprint.now
    del leaving
    return left


@torch.no_grad()
def mapped(optimizer: torch.optim.Optimizer, folder: Path | None = None) -> int:
    """Move what an optimiser remembers into files without a name, and return their bytes.

    Values, and every step taken on them, are the same to the bit.
    """
    moved = 0
    for memory in optimizer.state.values():
        for name, value in memory.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            local = value.to_local() if isinstance(value, DTensor) else value
            if local.device.type != "cpu" or not local.numel():
                continue
            away = _file_backed(local, folder)
            moved += away.numel() * away.element_size()
            whole = partial(DTensor.from_local, run_check=False)
            memory[name] = (
                whole(away, value.device_mesh, value.placements, shape=value.shape, stride=value.stride())
                if isinstance(value, DTensor)
                else away
            )
    return moved


def _file_backed(tensor: Tensor, folder: Path | None) -> Tensor:
    with tempfile.NamedTemporaryFile(prefix="mycel-optimizer-", dir=folder) as file:
        file.truncate(tensor.numel() * tensor.element_size())
        away = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    return away.copy_(tensor)
