"""Fixed point: whole numbers of one step that everybody knows, so that sums of what travels mean sums."""

from __future__ import annotations

import torch
from torch import Tensor

from mycel.errors import ParcelError
from mycel.wire.codec import Parts
from mycel.wire.codecs.layout import LaidOut, Layout, largest_magnitude

MOST_BITS = 24  # a float32 holds every whole number of so many bits


class Fixed(LaidOut):
    """Round to the nearest multiple of ``reach / (2^(bits-1) - 1)``; what lies beyond ``reach`` becomes ``reach``.

    The step follows from the spec alone, never from the tensor: that is what lets secure aggregation add levels of
    several parties and decode the sum.

    Parameters
    ----------
    bits : int
        2 to 24; an element travels as 1, 2 or 4 bytes.
    reach : float
        Largest magnitude that is told apart, in the tensor's own unit.
    """

    linear = True

    def __init__(self, bits: int, reach: float) -> None:
        self.bits, self.reach = bits, reach
        self.most = (1 << (bits - 1)) - 1
        self.step = reach / self.most
        self.kind = torch.int8 if bits <= 8 else torch.int16 if bits <= 16 else torch.int32
        self.spec = f"fixed({bits},{reach!r})"

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """One whole number an element."""
        return {"levels": (self.kind, shape)}

    def levels(self, tensor: Tensor) -> Tensor:
        """Return the whole numbers that stand for ``tensor``, as int64."""
        largest_magnitude(tensor, self.spec)
        return (tensor.double() / self.step).round_().clamp_(-self.most, self.most).to(torch.int64)

    def encode(self, tensor: Tensor) -> Parts:
        """Divide, round, cut off."""
        return {"levels": self.levels(tensor).to(self.kind)}

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        """Multiply by the step."""
        levels = parts["levels"]
        if levels.numel() and int(levels.to(torch.int64).abs().max()) > self.most:
            raise ParcelError(f"{self.spec!r} has a level beyond {self.most}")
        return self.value(levels)

    def value(self, levels: Tensor) -> Tensor:
        """Return the float32 numbers that levels, or sums of levels, stand for."""
        return (levels.double() * self.step).float()

    def error_bound(self, tensor: Tensor) -> float:
        """Half a step, or what is cut off beyond the reach, and the roundings of the numbers themselves."""
        largest = largest_magnitude(tensor, self.spec)
        return max(self.step / 2, largest - self.reach) + max(largest, self.reach) * 2.0**-22 if largest else 0.0
