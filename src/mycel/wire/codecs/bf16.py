"""Half the bytes: bfloat16 keeps float32's range and 8 significant bits."""

from __future__ import annotations

import torch
from torch import Tensor

from mycel.wire.codec import Parts
from mycel.wire.codecs.layout import LaidOut, Layout, largest_magnitude

LARGEST = torch.finfo(torch.bfloat16).max
# Half a unit in the last place: of 8 significant bits, and of the smallest number that is not zero.
RELATIVE_ERROR = 2.0**-8
ABSOLUTE_ERROR = 2.0**-134


class BFloat16(LaidOut):
    """Round to the nearest bfloat16: 2 bytes an element."""

    spec = "bf16"

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """One part of the tensor's shape."""
        return {"rounded": (torch.bfloat16, shape)}

    def encode(self, tensor: Tensor) -> Parts:
        """Round; what would round up to infinity becomes the largest finite number instead."""
        if largest_magnitude(tensor, self.spec) > LARGEST:
            tensor = tensor.clamp(-LARGEST, LARGEST)
        return {"rounded": tensor.to(torch.bfloat16)}

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        """Widen back to float32, which is exact."""
        return parts["rounded"].to(torch.float32)

    def error_bound(self, tensor: Tensor) -> float:
        """Half a unit in the last place of the largest element."""
        largest = largest_magnitude(tensor, self.spec)
        return largest * RELATIVE_ERROR + ABSOLUTE_ERROR if largest else 0.0
