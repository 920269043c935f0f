"""A quarter of the bytes: blocks of integers from -127 to 127, each block with a scale of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mycel.errors import ParcelError
from mycel.wire.codec import Parts
from mycel.wire.codecs.layout import LaidOut, Layout, largest_magnitude

LEVELS = 127
# The smallest scale: a normal number, so that neither it nor its reciprocal is flushed or overflows.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# The largest: below the exact quotient by more than a rounding, so that 127 steps of it stay finite.
LARGEST_SCALE = torch.finfo(torch.float32).max / LEVELS * (1 - 2.0**-23)
# Blocks are worked on in pieces that stay in a core's cache (elements).
PIECE = 1 << 17
# A half step, and the float32 rounding of one multiplication on either side of 127 levels.
HALF_STEP = 0.5 + 4 * LEVELS * 2.0**-24


class Int8(LaidOut):
    """Symmetric quantisation to the nearest of 255 levels between -m and m, m a block's largest magnitude.

    Parameters
    ----------
    block : int
        Elements that share one float32 scale: 1 + 4 / block bytes an element.
    """

    def __init__(self, block: int = 64) -> None:
        self.block = block
        self.spec = f"int8({block})"

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """One level an element, one scale a block."""
        count = math.prod(shape)
        return {"levels": (torch.int8, (count,)), "scales": (torch.float32, (-(-count // self.block),))}

    def encode(self, tensor: Tensor) -> Parts:
        """Scale each block by its largest magnitude and round to the nearest level."""
        flat = tensor.reshape(-1)
        levels = torch.empty(flat.shape, dtype=torch.int8)
        peaks = torch.empty(-(-flat.numel() // self.block))
        for start, stop in self._pieces(flat.numel()):
            piece = self._rows(flat[start:stop])
            peak = piece.abs().amax(1)
            peaks[start // self.block : -(-stop // self.block)] = peak
            scaled = (piece * _scales(peak).reciprocal()[:, None]).round_()
            levels[start:stop] = scaled.reshape(-1)[: stop - start]
        largest_magnitude(peaks, self.spec)
        return {"levels": levels, "scales": _scales(peaks)}

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        """Multiply each block of levels by its scale."""
        levels, scales = parts["levels"], parts["scales"]
        if levels.numel() and levels.min() < -LEVELS:
            raise ParcelError(f"{self.spec!r} has a level below -{LEVELS}")
        if not ((scales >= 0) & (scales <= LARGEST_SCALE)).all():
            raise ParcelError(f"{self.spec!r} has a scale that is negative, not a number or too large")
        values = torch.empty(levels.shape)
        for start, stop in self._pieces(levels.numel()):
            scale = scales[start // self.block : -(-stop // self.block)]
            scaled = self._rows(levels[start:stop]) * scale[:, None]
            values[start:stop] = scaled.reshape(-1)[: stop - start]
        return values.reshape(shape)

    def error_bound(self, tensor: Tensor) -> float:
        """Half a step of the coarsest block, hence of the largest magnitude in the tensor."""
        largest = largest_magnitude(tensor, self.spec)
        return max(largest / LEVELS, SMALLEST_SCALE) * HALF_STEP if largest else 0.0

    def _pieces(self, count: int) -> list[tuple[int, int]]:
        step = max(PIECE // self.block, 1) * self.block
        return [(start, min(start + step, count)) for start in range(0, count, step)]

    def _rows(self, piece: Tensor) -> Tensor:
        """View a piece as rows of one block, the last one filled up with zeros."""
        missing = -piece.numel() % self.block
        return torch.nn.functional.pad(piece, (0, missing)).view(-1, self.block)


def _scales(peaks: Tensor) -> Tensor:
    return (peaks / LEVELS).clamp_(SMALLEST_SCALE, LARGEST_SCALE)
