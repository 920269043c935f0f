"""Updates as one vector of whole numbers in a ring just wide enough for the sum of all of them."""

from __future__ import annotations

import numpy as np
import torch

from mycel.errors import ParcelError, RecipeError
from mycel.guard.contract import Shapes
from mycel.guard.secagg.keys import Ring
from mycel.wire.codecs.fixed import Fixed
from mycel.wire.parcel import Tensors

WIDTHS = (16, 32, 64)
KINDS = {16: torch.int16, 32: torch.int32, 64: torch.int64}


def width(codec: Fixed, weight: int) -> int:
    """Bits of the narrowest ring in which a sum of levels with weights that add up to ``weight`` does not wrap."""
    bits = (2 * codec.most * weight).bit_length()
    for wide in WIDTHS:
        if bits <= wide:
            return wide
    raise RecipeError(f"a sum of {bits} bits has no room in {WIDTHS[-1]}: take fewer bits in wire.codec {codec.spec!r}")


def flatten(update: Tensors, codec: Fixed, weight: int, within: bool, wide: int) -> Ring:
    """Lay an update out in the order of names, times its weight, with one more number that counts the bounded ones."""
    parts = [codec.levels(update[name].detach().float()).reshape(-1) for name in sorted(update)]
    levels = torch.cat([*parts, torch.tensor([0])]) * weight
    levels[-1] = int(within)
    return levels.numpy().astype(f"<u{wide // 8}")


def unflatten(total: Ring, codec: Fixed, shapes: Shapes) -> tuple[Tensors, int]:
    """Return the sums as float32 tensors, and the count."""
    signed = torch.from_numpy(total.astype(np.dtype(f"<u{total.itemsize}")).view(f"<i{total.itemsize}").astype("<i8"))
    sizes = [int(np.prod(shapes[name], dtype=np.int64)) for name in sorted(shapes)]
    if len(signed) != sum(sizes) + 1:
        raise ParcelError(f"a hidden sum has {len(signed)} numbers where {sum(sizes) + 1} were asked for")
    parts = torch.split(signed[:-1], sizes)
    tensors = {name: part.reshape(shapes[name]) for name, part in zip(sorted(shapes), parts, strict=True)}
    return tensors, int(signed[-1])
