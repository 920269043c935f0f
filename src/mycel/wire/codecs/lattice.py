"""Unbiased quantisation: on a lattice shifted at random, or by stochastic rounding.

A bucket of numbers from low to high is cut into ``2^bits - 1`` steps of one length.

    lattice(bits)    delta round((x - r) / delta) + r,  r uniform in half a step either way, one draw for a tensor
    rounding(bits)   up or down to a neighbouring level, with the odds that keep the mean

Both have the mean x over their draws, which a seed made of the tensor's own values decides, so that every holder of
the same tensor encodes alike. Vectors (norms, biases) travel as they are. After QSDP (arXiv:2302.02390).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from mycel.errors import ParcelError
from mycel.wire.codec import Parts
from mycel.wire.codecs.layout import LaidOut, Layout, largest_magnitude
from mycel.wire.randomness import generator

BUCKET = 1024  # elements that share a lowest value and a step
SLACK = 1 + 2.0**-16  # float32 rounding of the arithmetic around a level


class Buckets(LaidOut):
    """Levels of ``bits`` bits in buckets of 1,024 elements.

    Parameters
    ----------
    bits : int
        From 2 to 8; an element takes a byte, for what an entropy coder makes of fewer bits is its own matter.
    """

    name: str

    def __init__(self, bits: int = 8) -> None:
        self.bits = bits
        self.spec = f"{self.name}({bits})"

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """One level an element; a lowest value and a step a bucket. Vectors: their elements."""
        count = math.prod(shape)
        if len(shape) < 2 or not count:
            return {"plain": (torch.float32, shape)}
        buckets = -(-count // BUCKET)
        sizes = {"lows": (torch.float32, (buckets,)), "steps": (torch.float32, (buckets,))}
        return {"levels": (torch.uint8, (count,)), **sizes}

    def encode(self, tensor: Tensor) -> Parts:
        """Quantise each bucket between its own lowest and highest value."""
        if "plain" in self.layout(tuple(tensor.shape)):
            return {"plain": tensor}
        largest_magnitude(tensor, self.spec)
        flat = tensor.reshape(-1).contiguous()
        rows = torch.nn.functional.pad(flat, (0, -flat.numel() % BUCKET)).view(-1, BUCKET)
        low, high = rows.aminmax(dim=1)
        low, steps = self.grid(low, high, flat)
        scaled = (rows - low[:, None]) / steps[:, None]
        levels = self.choose(scaled, flat).clamp_(0, 2**self.bits - 1)
        return {"levels": levels.to(torch.uint8).view(-1)[: flat.numel()], "lows": low, "steps": steps}

    def grid(self, low: Tensor, high: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest level and step of each bucket; overridden where the grid is shifted."""
        return low, _step((high - low) / (2**self.bits - 1))

    def choose(self, scaled: Tensor, flat: Tensor) -> Tensor:
        """Round numbers counted in steps to levels."""
        raise NotImplementedError

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        """Lowest value plus level times step."""
        if "plain" in parts:
            return parts["plain"].reshape(shape)
        levels, lows, steps = parts["levels"], parts["lows"], parts["steps"]
        sound = bool(torch.isfinite(lows).all()) and bool((torch.isfinite(steps) & (steps > 0)).all())
        if not sound or int(levels.max()) >= 2**self.bits:
            raise ParcelError(f"{self.spec!r} has a level, a lowest value or a step out of range")
        rows = torch.nn.functional.pad(levels, (0, -levels.numel() % BUCKET)).view(-1, BUCKET)
        values = rows.to(torch.float32) * steps[:, None] + lows[:, None]
        return values.view(-1)[: levels.numel()].reshape(shape)

    def error_bound(self, tensor: Tensor) -> float:
        """A step of the widest bucket."""
        if "plain" in self.layout(tuple(tensor.shape)):
            return 0.0
        parts = self.encode(tensor)
        return (float(parts["steps"].max()) + 4 * largest_magnitude(tensor, self.spec) * 2.0**-24) * SLACK


class Lattice(Buckets):
    """Nearest level of a lattice whose origin was shifted at random."""

    name = "lattice"

    def grid(self, low: Tensor, high: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Shift every bucket's grid by the same share of its step; one level makes room for it."""
        steps = _step((high - low) / (2**self.bits - 2))
        shift = torch.rand((), generator=generator(_seed(flat)))
        return low - shift * steps, steps

    def choose(self, scaled: Tensor, flat: Tensor) -> Tensor:
        """Round to the nearest level."""
        return scaled.round()


class Rounding(Buckets):
    """Up or down by chance, so that the mean is kept."""

    name = "rounding"

    def choose(self, scaled: Tensor, flat: Tensor) -> Tensor:
        """Add a uniform number and cut the fraction off."""
        return (scaled + torch.rand(scaled.shape, generator=generator(_seed(flat)))).floor_()


def _seed(flat: Tensor) -> int:
    return int.from_bytes(hashlib.blake2b(flat.numpy().data, digest_size=8).digest(), "little") >> 1


def _step(steps: Tensor) -> Tensor:
    # A bucket of equal numbers has no width; any step above zero stands for it.
    return steps.clamp(min=torch.finfo(torch.float32).tiny, max=torch.finfo(torch.float32).max / 512)
