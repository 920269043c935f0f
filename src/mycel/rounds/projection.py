"""A change told as coordinates along shared random directions, block by block, with more of them where it is longer.

    gamma_k = (d / K) <x, v_k>,   x' = sum_k gamma_k v_k,   v_k ~ N(0, I) cut to [-1/sqrt(d), 1/sqrt(d)] elementwise

for a block x of d elements and its K directions. E[v v^T] = I / (3 d), so E[x'] = x / 3, and the cosine between x and
x' is near sqrt(K / (K + d)).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mycel.wire.algebra import seed_of
from mycel.wire.parcel import Tensors
from mycel.wire.randomness import direction, seed_pool

LEAST = 2  # directions that even a still block gets


def partition(shapes: Mapping[str, Sequence[int]], relative: float) -> list[list[str]]:
    """Put adjacent tensors into blocks of at least ``relative`` times the median tensor's elements."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    enough = relative * sorted(sizes)[len(sizes) // 2]
    blocks: list[list[str]] = [[]]
    filled = 0
    for name, size in zip(shapes, sizes, strict=True):
        if blocks[-1] and filled >= enough:
            blocks.append([])
            filled = 0
        blocks[-1].append(name)
        filled += size
    return blocks


def flatten(tensors: Tensors, block: Sequence[str]) -> Tensor:
    """Lay a block's tensors out as one vector."""
    return torch.cat([tensors[name].reshape(-1) for name in block])


def unflatten(vectors: Sequence[Tensor], blocks: Sequence[Sequence[str]], like: Tensors) -> Tensors:
    """Inverse of ``flatten`` over all blocks, with the shapes of ``like``."""
    tensors: Tensors = {}
    for vector, block in zip(vectors, blocks, strict=True):
        parts = torch.split(vector, [like[name].numel() for name in block])
        tensors |= {name: part.reshape(like[name].shape) for name, part in zip(block, parts, strict=True)}
    return tensors


def allot(total: int, norms: Sequence[float]) -> list[int]:
    """Share ``total`` directions out in proportion to ``norms``, at least two each, to the last one.

    Parameters
    ----------
    total : int
        At least twice the number of blocks.
    """
    spare, length = total - LEAST * len(norms), sum(norms)
    shares = [spare * norm / length if length else spare / len(norms) for norm in norms]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(norms)), key=lambda index: (counts[index] - shares[index], index))
    for index in by_remainder[: spare - sum(counts)]:
        counts[index] += 1
    return [LEAST + count for count in counts]


def project(vector: Tensor, count: int, *purpose: int | str) -> Tensor:
    """Return the ``count`` coordinates of ``vector`` along the directions that ``purpose`` names."""
    along = [float(basis @ vector) for basis in _bases(count, len(vector), purpose)]
    return torch.tensor(along, dtype=torch.float32) * (len(vector) / count)


def reconstruct(coordinates: Tensor, size: int, *purpose: int | str) -> Tensor:
    """Return the vector of ``size`` elements that coordinates stand for, a third of the original on average."""
    vector = torch.zeros(size)
    bases = _bases(len(coordinates), size, purpose)
    for coordinate, basis in zip(coordinates.tolist(), bases, strict=True):
        vector.add_(basis, alpha=coordinate)
    return vector


def _bases(count: int, size: int, purpose: Sequence[int | str]) -> Iterator[Tensor]:
    # A longer pool begins with the shorter ones, so parties that use unlike numbers of directions share the first.
    for seed in seed_pool(seed_of("projection", *purpose), count):
        yield direction(seed, (size,), "truncated")
