"""A few scalars and a seed: the shadow of a tensor on random directions, which the receiver rebuilds.

    s_k = <v_k, x>,        decoded = (1 / K) * sum_k s_k v_k,        v_k in {-1, 1}^d from seed k

E[v v^T] is the identity, so the mean over seeds is x itself; E|decoded - x|^2 = ((d - 1) / K) |x|^2, and
the cosine between the two is near sqrt(K / (K + d)). The bytes do not depend on d. After Ferret
(arXiv:2409.06277), with signs in place of its truncated normal: they vary least, are drawn ten times as fast,
and are the same on every machine to the bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mycel.errors import ParcelError
from mycel.wire.codec import Parts
from mycel.wire.codecs.layout import VALUES, LaidOut, Layout, largest_magnitude
from mycel.wire.randomness import direction, seed_pool

# Random signs that one tensor may cost (elements times directions): about a minute of one core.
MOST_SIGNS = 1 << 37
# float32 sums over directions and over elements lose a little of the exact identity above.
SUMMATION = 1.001


class Seeds(LaidOut):
    """Project on ``count`` random sign vectors; a tensor with no more elements than that travels as it is.

    The seed is a digest of the tensor, so encoding is deterministic while parties and rounds differ.

    Parameters
    ----------
    count : int
        Directions K: 4 K + 8 bytes a tensor.
    """

    def __init__(self, count: int = 256) -> None:
        self.count = count
        self.spec = f"seeds({count})"

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """K scalars and a seed; for a small tensor its own elements."""
        size = math.prod(shape)
        if size <= self.count:
            return {VALUES: (torch.float32, (size,))}
        if size * self.count > MOST_SIGNS:
            raise ParcelError(
                f"{self.spec!r} on {size:,} elements would draw {size * self.count:.1e} random signs, "
                f"more than {MOST_SIGNS:.1e}: use fewer seeds or another codec"
            )
        return {"seed": (torch.int64, ()), VALUES: (torch.float32, (self.count,))}

    def encode(self, tensor: Tensor) -> Parts:
        """Take the scalar products with every direction, one direction in memory at a time."""
        flat = tensor.reshape(-1).contiguous()
        if "seed" not in self.layout(tuple(tensor.shape)):
            return {VALUES: flat}
        largest_magnitude(flat, self.spec)
        digest = hashlib.blake2b(flat.numpy().data, digest_size=8).digest()
        master = int.from_bytes(digest, "little") >> 1
        scalars = torch.stack([torch.dot(signs, flat) for signs in self._directions(master, flat.numel())])
        largest_magnitude(scalars, self.spec)
        return {"seed": torch.tensor(master), VALUES: scalars}

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        """Rebuild every direction and add it, weighted by its scalar."""
        if "seed" not in parts:
            return parts[VALUES].reshape(shape)
        master = int(parts["seed"].item())
        if master < 0:
            raise ParcelError(f"{self.spec!r} has the seed {master}, which is negative")
        total = torch.zeros(math.prod(shape))
        weights = (parts[VALUES] / self.count).tolist()
        for weight, signs in zip(weights, self._directions(master, total.numel()), strict=True):
            total.add_(signs, alpha=weight)
        return total.reshape(shape)

    def error_bound(self, tensor: Tensor) -> float:
        """Largest element plus the mean magnitude of the scalars, for every sign may fall the wrong way."""
        parts = self.encode(tensor)
        if "seed" not in parts:
            return 0.0
        missed = parts[VALUES].double().abs().mean().item()
        return (largest_magnitude(tensor, self.spec) + missed) * SUMMATION

    def variance(self, shape: tuple[int, ...]) -> float:
        """(d - 1) / K."""
        size = math.prod(shape)
        return (size - 1) / self.count if size > self.count else 0.0

    def _directions(self, master: int, size: int) -> Iterator[Tensor]:
        return (direction(seed, (size,), "rademacher") for seed in seed_pool(master, self.count))
