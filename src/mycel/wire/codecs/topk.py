"""Only the largest: a fraction of the elements by magnitude, and where they stand."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mycel.errors import ParcelError
from mycel.wire.codec import Parts
from mycel.wire.codecs.layout import VALUES, LaidOut, Layout, largest_magnitude


class TopK(LaidOut):
    """Keep the ``fraction`` of largest magnitude; ties go to the earlier element.

    Places travel as the gaps between kept elements (the first counts from 0). A gap takes as many bytes as an
    index would, yet most of those bytes are zero, which an entropy coder that follows turns into nothing.

    Parameters
    ----------
    fraction : float
        Share of the elements kept, above 0 and at most 1; at least one element is kept.
    """

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction
        self.spec = f"topk({fraction!r})"
        self.lossless = fraction == 1.0

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """One value and one gap for every element kept."""
        count = math.prod(shape)
        kept = self._kept(count)
        return {"gaps": (index_type(count), (kept,)), VALUES: (torch.float32, (kept,))}

    def encode(self, tensor: Tensor) -> Parts:
        """Find the threshold, then what lies above it, then as many of what equals it as are still wanted."""
        largest_magnitude(tensor, self.spec)
        flat = tensor.reshape(-1)
        count = flat.numel()
        kept = self._kept(count)
        if kept == count:
            indices = np.arange(count)
        else:
            magnitudes = ordered_magnitudes(flat)
            threshold = np.partition(magnitudes, count - kept)[count - kept]
            indices = np.flatnonzero(magnitudes >= threshold)
            if len(indices) > kept:
                above = np.flatnonzero(magnitudes > threshold)
                equal = np.flatnonzero(magnitudes == threshold)
                indices = np.sort(np.concatenate([above, equal[: kept - len(above)]]))
        places = torch.from_numpy(indices)
        gaps = torch.diff(places, prepend=places.new_zeros(1))
        return {"gaps": gaps.to(index_type(count)), VALUES: flat[places]}

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        """Put the values in their places among zeros."""
        count = math.prod(shape)
        gaps = parts["gaps"].to(torch.int64)
        if len(gaps) and (gaps.min() < 0 or gaps.max() >= count or (gaps[1:] == 0).any()):
            raise ParcelError(f"{self.spec!r} has places outside the {count:,} elements, or one place twice")
        indices = gaps.cumsum(0)
        if len(indices) and indices[-1] >= count:
            raise ParcelError(f"{self.spec!r} has places outside the {count:,} elements")
        values = torch.zeros(count)
        values[indices] = parts[VALUES]
        return values.reshape(shape)

    def error_bound(self, tensor: Tensor) -> float:
        """Largest magnitude that is left out."""
        largest_magnitude(tensor, self.spec)
        count = tensor.numel()
        left_out = count - self._kept(count)
        if left_out == 0:
            return 0.0
        magnitudes = ordered_magnitudes(tensor.reshape(-1))
        place = np.partition(magnitudes, left_out - 1)[left_out - 1 : left_out]
        return float(place.view(np.float32)[0])

    def _kept(self, count: int) -> int:
        return min(count, math.ceil(self.fraction * count))


def index_type(count: int) -> torch.dtype:
    """Smallest integer type that holds an index into ``count`` elements."""
    for limit, dtype in ((1 << 8, torch.uint8), (1 << 16, torch.uint16), (1 << 31, torch.int32)):
        if count <= limit:
            return dtype
    return torch.int64


def ordered_magnitudes(flat: Tensor) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Magnitudes as int32 bit patterns: in the same order as the floats, and twice as fast to select from."""
    bits: np.ndarray[tuple[int], np.dtype[np.int32]] = flat.abs().view(torch.int32).numpy()
    return bits
