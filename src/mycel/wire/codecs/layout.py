"""Codecs whose parts have types and sizes that follow from the tensor's shape alone.

Knowing the layout beforehand is what lets a receiver refuse parts that do not fit, and bound what an entropy
coder may unfold, before any memory is taken.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from mycel.errors import ParcelError
from mycel.wire.codec import Codec, Parts

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
VALUES = "values"


class LaidOut(Codec):
    """A codec with a fixed layout.

    A float32 part named ``values`` is what a later codec in a chain encodes. The contract of that name: an
    error of at most e in every element of it moves no decoded element by more than e.
    """

    @abstractmethod
    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Type and shape of every part that a tensor of ``shape`` encodes to."""

    @abstractmethod
    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        """Decode parts that are known to have this layout."""

    def decode(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        """Check the parts against the layout, then unpack them."""
        layout = self.layout(shape)
        check_names(parts, layout, self.spec)
        for name, (dtype, size) in layout.items():
            part = parts[name]
            if part.dtype != dtype or tuple(part.shape) != size:
                raise ParcelError(
                    f"part {name!r} of {self.spec!r} is {part.dtype} of {tuple(part.shape)}, "
                    f"where a tensor of {shape} needs {dtype} of {size}"
                )
        return self.unpack(parts, shape)


def check_names(parts: Parts, layout: Layout, spec: str) -> None:
    """Refuse parts that are missing or too many."""
    if parts.keys() != layout.keys():
        found, wanted = ", ".join(sorted(parts))[:80] or "none", ", ".join(sorted(layout))
        raise ParcelError(f"{spec!r} needs the parts {wanted}; found {found}")


def largest_magnitude(tensor: Tensor, spec: str) -> float:
    """Largest absolute value, 0 when empty; NaN and infinities raise ``ParcelError``."""
    if tensor.numel() == 0:
        return 0.0
    low, high = torch.aminmax(tensor)
    largest = max(-low.item(), high.item())
    if not (math.isfinite(largest) and math.isfinite(low.item())):
        raise ParcelError(
            f"the tensor holds NaN or infinite values, which {spec!r} cannot carry: "
            "train with a lower learning rate or clip the gradients"
        )
    return float(largest)
