"""Entropy coding by Zstandard: every part's bytes, lost bits none."""

from __future__ import annotations

import math

import numpy as np
import torch
import zstandard
from torch import Tensor

from mycel.errors import ParcelError
from mycel.wire.codec import Codec, Parts
from mycel.wire.codecs.layout import LaidOut, Layout, check_names

LEVEL = 1
# Largest back-reference window a receiver makes room for (bytes); ours are smaller at this level.
WINDOW = 1 << 23


class Zstd(Codec):
    """Compress every part of ``inner``; part names stay, each part becomes one row of bytes.

    The bytes of wider types are first sorted by significance (all first bytes, then all second ones), since
    signs and exponents resemble one another and digits do not. What a part unfolds to is known from the
    shape, so a part that claims another size is refused before memory is taken for it.
    """

    def __init__(self, inner: LaidOut) -> None:
        self.inner = inner
        self.spec = "zstd" if inner.spec == "raw" else f"{inner.spec}+zstd"
        self.lossless = inner.lossless

    def encode(self, tensor: Tensor) -> Parts:
        """Encode with the inner codec, then compress its parts."""
        return {name: compress(part) for name, part in self.inner.encode(tensor).items()}

    def decode(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        """Unfold every part to the type and size that the shape demands, then decode with the inner codec."""
        layout = self.inner.layout(shape)
        check_names(parts, layout, self.spec)
        # Every part is checked before the first one is unfolded.
        for name, part in parts.items():
            check_compressed(name, part, _size(layout, name))
        unfolded = {name: decompress(name, parts[name], *layout[name]) for name in layout}
        return self.inner.decode(unfolded, shape)

    def error_bound(self, tensor: Tensor) -> float:
        """As the inner codec's."""
        return self.inner.error_bound(tensor)

    def variance(self, shape: tuple[int, ...]) -> float:
        """As the inner codec's."""
        return self.inner.variance(shape)


def compress(part: Tensor) -> Tensor:
    """Return the part's bytes, sorted by significance and compressed, as a row of uint8."""
    if part.numel() == 0:
        return torch.empty(0, dtype=torch.uint8)
    octets = part.contiguous().reshape(-1).view(torch.uint8).numpy()
    shuffled = np.ascontiguousarray(octets.reshape(-1, part.element_size()).T)
    packed = zstandard.ZstdCompressor(level=LEVEL).compress(shuffled.data)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def check_compressed(name: str, part: Tensor, size: int) -> None:
    """Refuse a part that is not a row of compressed bytes announcing exactly ``size`` bytes."""
    if part.dtype != torch.uint8 or part.dim() != 1:
        raise ParcelError(f"compressed part {name!r} is {part.dtype} of {tuple(part.shape)}: a row of bytes is needed")
    if size == 0:
        if len(part):
            raise ParcelError(f"compressed part {name!r} has {len(part):,} bytes, where nothing is to unfold")
        return
    try:
        announced = zstandard.get_frame_parameters(part.numpy().data)
    except zstandard.ZstdError as error:
        raise ParcelError(f"compressed part {name!r} is damaged: {error}") from error
    if announced.content_size != size:
        raise ParcelError(f"compressed part {name!r} announces {announced.content_size:,} bytes where {size:,} fit")


def decompress(name: str, part: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Undo ``compress``; the part is known to announce the right size."""
    if len(part) == 0:
        return torch.empty(shape, dtype=dtype)
    try:
        unpacked = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompress(
            part.numpy().data, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise ParcelError(f"compressed part {name!r} is damaged: {error}") from error
    octets = np.frombuffer(unpacked, dtype=np.uint8).reshape(dtype.itemsize, -1)
    if octets.size != math.prod(shape) * dtype.itemsize:
        raise ParcelError(f"compressed part {name!r} unfolds to {octets.size:,} bytes, another size than announced")
    return torch.from_numpy(octets.T.copy(order="C").reshape(-1)).view(dtype).reshape(shape)


def _size(layout: Layout, name: str) -> int:
    dtype, shape = layout[name]
    return math.prod(shape) * dtype.itemsize
