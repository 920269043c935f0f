"""Bound what one party can change: scale its update so that its norm is at most a given number."""

from __future__ import annotations

import torch

from mycel.wire.parcel import Tensors


def clip(update: Tensors, bound: float) -> Tensors:
    """Return ``update * min(1, bound / |update|)``, the Euclidean norm taken over all tensors together."""
    squares = [tensor.double().square().sum() for tensor in update.values() if tensor.is_floating_point()]
    size = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    if size <= bound:
        return update
    factor = bound / size
    return {name: tensor * factor if tensor.is_floating_point() else tensor for name, tensor in update.items()}
