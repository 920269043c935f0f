"""Counts the bytes that a rank's collectives carry, by what each of them must send in a ring.

Per rank of n, for a tensor of s bytes (of all shards together, for gathers and scatters):
all-gather and reduce-scatter ``s (n-1)/n``, all-reduce ``2 s (n-1)/n``, broadcast ``s (n-1)/n``, a message
to one rank ``s``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
SENDING = ("allreduce", "all_reduce", "allgather", "all_gather", "reduce_scatter", "broadcast", "send", "alltoall")


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the block, counts what is sent.

    Attributes
    ----------
    bytes : float
        By this rank.
    calls : dict of str to int
        How often each operation was called.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out the operation; if it is a collective, count it."""
        space, name = func.namespace, func._schema.name.rpartition("::")[2]
        if space in {"c10d", "_c10d_functional", "c10d_functional"}:
            found = _bytes_of(space, name, args, kwargs or {})
            if found:
                self.bytes += found
                self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def _bytes_of(space: str, name: str, args: Any, kwargs: dict[str, Any]) -> int:
    if not name.lstrip("_").startswith(SENDING):
        return 0
    tensors = [tensor for tensor in _flat(args) if isinstance(tensor, Tensor)]
    if not tensors:
        return 0
    size = max(tensor.numel() * tensor.element_size() for tensor in tensors)
    if name.startswith("send"):
        return size
    ranks = _ranks(args, kwargs)
    if space != "c10d" and name.startswith("all_gather"):
        size *= ranks  # the functional form is given one shard and returns the whole
    factor = 2 if name.replace("_", "").startswith("allreduce") else 1
    return factor * size * (ranks - 1) // max(ranks, 1)


def _ranks(args: Any, kwargs: dict[str, Any]) -> int:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.ScriptObject):
            try:
                return int(dist.ProcessGroup.unbox(value).size())
            except (RuntimeError, TypeError, AttributeError):
                continue
        if isinstance(value, str) and value.isdigit():
            return int(resolve(value).size())
    return dist.get_world_size()


def _flat(tree: Any) -> list[Any]:
    if isinstance(tree, list | tuple):
        return [leaf for part in tree for leaf in _flat(part)]
    return [tree]
