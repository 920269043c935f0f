"""Nothing is shrunk: the float32 values themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from mycel.wire.codec import Parts
from mycel.wire.codecs.layout import VALUES, LaidOut, Layout


class Raw(LaidOut):
    """Send the float32 values as they are: 4 bytes an element."""

    spec = "raw"
    lossless = True
    linear = True

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """One part, the tensor."""
        return {VALUES: (torch.float32, shape)}

    def encode(self, tensor: Tensor) -> Parts:
        """Return the tensor itself."""
        return {VALUES: tensor}

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        """Return the tensor itself."""
        return parts[VALUES]

    def error_bound(self, tensor: Tensor) -> float:
        """Nothing is lost."""
        return 0.0


RAW: Raw = Raw()
