"""Random directions that any party rebuilds from a seed: a scalar and a seed travel, a whole tensor arrives.

Draws come from one ``torch.Generator`` on the CPU in a fixed order, so they depend on the seed, the number of
elements and the distribution: never on threads, devices or global random state. ``rademacher`` is made of
integer bits only and is therefore the same on every machine; the other two pass through logarithms, whose
last bit may differ between kinds of processor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Distribution = Literal["normal", "truncated", "rademacher"]
SEED_LIMIT = 1 << 63
WORD = (1 << 32) - 1


def generator(seed: int) -> torch.Generator:
    """Return a CPU generator for a seed of up to 63 bits.

    torch's generator reads the lower 32 bits of its seed only, so the upper ones are folded into them; seeds
    below 2**32 stay as they are.
    """
    if not 0 <= seed < SEED_LIMIT:
        raise ValueError(f"the seed {seed} is not between 0 and 2**63 - 1")
    return torch.Generator().manual_seed((seed ^ (seed >> 32) * 0x9E3779B1) & WORD)


def direction(seed: int, shape: Sequence[int], distribution: Distribution = "normal") -> Tensor:
    """Return the random direction that ``seed`` stands for.

    Parameters
    ----------
    seed : int
        From 0 to 2**63 - 1.
    shape : sequence of int
        Its elements are drawn in row-major order, so two shapes of one size hold the same numbers.
    distribution : {"normal", "truncated", "rademacher"}
        Standard normal; standard normal cut to +-1/sqrt(d), d the number of elements, whose variance is near
        1 / (3 d) (Ferret, arXiv:2409.06277); or -1 and 1 with equal odds.

    Returns
    -------
    Tensor
        float32 on the CPU.
    """
    count = math.prod(shape)
    source = generator(seed)
    if distribution == "normal":
        return torch.empty(count).normal_(generator=source).reshape(tuple(shape))
    if distribution == "truncated":
        return _truncated(count, source).reshape(tuple(shape))
    if distribution == "rademacher":
        return _rademacher(count, source).reshape(tuple(shape))
    raise ValueError(f"distribution {distribution!r} is unknown: {', '.join(get_args(Distribution))}")


def seed_pool(master: int, count: int) -> list[int]:
    """Return ``count`` different seeds below 2**32 that every holder of ``master`` derives alike.

    A longer pool of one master begins with the shorter ones.
    """
    if not 0 <= count <= 1 << 24:
        raise ValueError(f"a pool of {count} seeds is not between 0 and 2**24")
    source = generator(master)
    pool: dict[int, None] = {}
    while len(pool) < count:
        drawn = torch.randint(0, WORD + 1, (256,), generator=source, dtype=torch.int64)
        pool.update(dict.fromkeys(drawn.tolist()))
    return list(pool)[:count]


def _truncated(count: int, source: torch.Generator) -> Tensor:
    limit = 1 / math.sqrt(max(count, 1))
    mass = math.erf(limit / math.sqrt(2))
    uniform = torch.empty(count).uniform_(-mass, mass, generator=source)
    return uniform.erfinv_().mul_(math.sqrt(2)).clamp_(-limit, limit)


def _rademacher(count: int, source: torch.Generator) -> Tensor:
    words = torch.empty(-(-count // 64), dtype=torch.int64).random_(-SEED_LIMIT, None, generator=source)
    # Little-endian whatever the machine, so that a word's bits keep one order.
    octets = words.numpy().astype("<i8", copy=False).view(np.uint8)
    bits = torch.from_numpy(np.unpackbits(octets, count=count))
    return bits.to(torch.float32).mul_(2).sub_(1)
