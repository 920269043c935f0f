"""What the guards' own messages are made of: bytes as tensors, and lists of nodes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mycel.errors import ParcelError
from mycel.wire.parcel import Parcel


def write(content: bytes) -> Tensor:
    """Return bytes as a tensor that travels."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def read(letter: Parcel, name: str) -> bytes:
    """Inverse of ``write`` for the tensor of any role and this name."""
    for full, tensor in letter.tensors.items():
        if full.rpartition("/")[2] == name and tensor.dtype == torch.uint8:
            return tensor.numpy().tobytes()
    raise ParcelError(f"the message lacks {name!r}")


def cut(content: bytes, nodes: Sequence[int]) -> dict[int, bytes]:
    """Give each node its part of what lies one after another."""
    size = len(content) // max(len(nodes), 1)
    return {node: content[size * place : size * (place + 1)] for place, node in enumerate(nodes)}


def numbers(message: Parcel, key: str) -> list[int]:
    """Return a list of node numbers from a message's header, in order."""
    found = message.header.get(key)
    if not isinstance(found, list) or not all(type(number) is int and number >= 0 for number in found):
        raise ParcelError(f"the message's {key!r} is {str(found)[:40]!r}; a list of node numbers is needed")
    return sorted(found)
