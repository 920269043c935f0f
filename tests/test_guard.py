"""Clipping: direction kept, norm bounded, small updates untouched."""

from __future__ import annotations

import pytest
import torch

from mycel.guard.clip import clip
from mycel.wire.algebra import cosine, norm
from mycel.wire.parcel import Tensors


def make(scale: float) -> Tensors:
    source = torch.Generator().manual_seed(3)
    return {name: scale * torch.randn(4, 5, generator=source) for name in ("a", "b")}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("bound", [0.5, 2.0])
def test_norm_is_bounded_and_direction_kept(scale: float, bound: float) -> None:
    update = make(scale)
    clipped = clip(update, bound)
    assert norm(clipped) == pytest.approx(min(norm(update), bound), rel=1e-5)
    assert cosine(clipped, update) == pytest.approx(1.0, abs=1e-6)


def test_small_update_is_returned_as_it_is() -> None:
    update = make(1e-3)
    assert all(torch.equal(value, update[name]) for name, value in clip(update, 1.0).items())


def test_an_update_of_zeros_stays_zero() -> None:
    assert norm(clip({"a": torch.zeros(3)}, 1.0)) == 0.0
