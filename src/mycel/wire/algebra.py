"""Arithmetic on named tensors: what combining states and changes is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch

from mycel.wire.parcel import Tensors


def subtract(left: Tensors, right: Tensors) -> Tensors:
    """``left - right``, name by name."""
    return {name: tensor - right[name] for name, tensor in left.items()}


def add(left: Tensors, right: Tensors, scale: float = 1.0) -> Tensors:
    """``left + scale * right``; names that ``right`` lacks are unchanged."""
    return {
        name: torch.add(tensor, right[name], alpha=scale) if name in right else tensor for name, tensor in left.items()
    }


def scale(tensors: Tensors, factor: float) -> Tensors:
    """``factor * tensors``, name by name."""
    return {name: tensor * factor for name, tensor in tensors.items()}


def weighted_mean(states: Iterable[Tensors], weights: Sequence[float]) -> Tensors:
    """Mean with weights that are normalised here; states are taken one by one, and one alone comes back unchanged."""
    total = sum(weights)
    mean: Tensors = {}
    for state, weight in zip(states, weights, strict=True):
        if len(weights) == 1:
            return dict(state)
        for name, tensor in state.items():
            if name not in mean:
                mean[name] = torch.zeros_like(tensor)
            mean[name].add_(tensor, alpha=weight / total)
    return mean


def discount(staleness: int, exponent: float) -> float:
    """Factor ``(1 + staleness)^-exponent`` of an answer to a brief that is ``staleness`` versions old."""
    return float((1 + staleness) ** -exponent)


def norm(tensors: Tensors) -> float:
    """Euclidean norm over all tensors together."""
    return float(
        torch.sqrt(
            sum(
                (tensor.double().square().sum() for tensor in tensors.values()),
                torch.zeros((), dtype=torch.float64),
            )
        )
    )


def cosine(left: Tensors, right: Tensors) -> float:
    """Cosine of the angle between two sets of tensors; 0 when either vanishes."""
    inner = sum(float((tensor.double() * right[name].double()).sum()) for name, tensor in left.items())
    size = norm(left) * norm(right)
    return inner / size if size else 0.0


def resize_rank(state: Tensors, rank: int) -> Tensors:
    """Cut or zero-pad LoRA factors to ``rank``: rows of ``lora_A`` (r, in), columns of ``lora_B`` (out, r)."""
    resized = dict(state)
    for name, tensor in state.items():
        axis = 0 if name.endswith("lora_A") else 1 if name.endswith("lora_B") else None
        if axis is None or tensor.shape[axis] == rank:
            continue
        if tensor.shape[axis] > rank:
            resized[name] = tensor.narrow(axis, 0, rank).clone()
        else:
            shape = list(tensor.shape)
            shape[axis] = rank - shape[axis]
            resized[name] = torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)
    return resized


def seed_of(*parts: int | str) -> int:
    """Seed below 2^63 that depends on every part, the same on every machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def with_role(role: str, tensors: Tensors) -> Tensors:
    """Prefix names with the role under which they travel."""
    return {f"{role}/{name}": tensor for name, tensor in tensors.items()}


def group(tensors: Tensors, role: str) -> Tensors:
    """Return the tensors of one role, without the prefix."""
    start = f"{role}/"
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}
