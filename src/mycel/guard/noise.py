"""Gaussian noise for privacy, and the bound on norms that it is measured by."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from mycel.wire.parcel import Tensors
from mycel.wire.randomness import generator


def noise_source(seed: int | None) -> torch.Generator:
    """Return where noise comes from: the operating system's randomness, or a seed for runs that can be repeated.

    Whoever knows the seed can take the noise away again: a seed protects nobody.
    """
    return generator(int.from_bytes(os.urandom(8), "little") >> 1 if seed is None else seed)


def perturb(tensors: Tensors, deviation: float, source: torch.Generator) -> Tensors:
    """Add independent Gaussian noise of one standard deviation to every float tensor, in the order of names."""
    noisy = dict(tensors)
    for name in sorted(tensors):
        if tensors[name].is_floating_point():
            draw = torch.randn(tensors[name].shape, generator=source, dtype=torch.float64)
            noisy[name] = (tensors[name].double() + deviation * draw).to(tensors[name].dtype)
    return noisy


def next_bound(bound: float, within: float, target: float, rate: float = 0.2) -> float:
    """Return the next round's clipping bound: up where fewer than the ``target`` share of updates lay within it.

    Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping": C <- C exp(-rate (b - target)).
    """
    return bound * math.exp(-rate * (within - target))


def split_noise(multiplier: float, count_deviation: float) -> float:
    """Multiplier left for the updates when counting those within the bound has its own noise (the same paper, 2.3).

    ``z_update = (z^-2 - (2 s)^-2)^(-1/2)``; the pair costs as much privacy as one release with ``multiplier``.

    Raises
    ------
    ValueError
        When the count alone would cost more than that.
    """
    left = multiplier**-2 - (2 * count_deviation) ** -2
    if left <= 0:
        raise ValueError(f"a count with noise of {count_deviation} costs more than a multiplier of {multiplier} allows")
    return 1 / math.sqrt(left)


def flat_norm(tensors: Tensors) -> float:
    """Euclidean norm over all float tensors together."""
    squares: list[Tensor] = [value.double().square().sum() for value in tensors.values() if value.is_floating_point()]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
