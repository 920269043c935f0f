"""Summing gradients among whoever holds a weight: replicas, a tied head and its embedding, and shadows alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mycel.collectives.formation import Formation
from mycel.collectives.units import Chain, Unit
from mycel.collectives.waiting import group_of


class Exchange:
    """The sums of one epoch's formation; every member makes one, as groups are made by all together.

    A shadow adds nothing to the sum and receives it, so that its copy takes the same step as its holder's.
    """

    def __init__(self, chain: Chain, formation: Formation, members: Sequence[int], member: int) -> None:
        holders: dict[str, set[int]] = {}
        for holder, units in formation.needs().items():
            for name in {name for unit in units for name in chain.names(unit)}:
                holders.setdefault(name, set()).add(holder)
        self.names = sorted(holders)
        self.first = {name: min(held) for name, held in holders.items()}
        self.member = member
        self._sets: list[tuple[list[str], dist.ProcessGroup | None]] = []
        for held in sorted({tuple(sorted(held)) for held in holders.values()}):
            names = [name for name in self.names if tuple(sorted(holders[name])) == held]
            alone = len(held) == 1
            group = None if alone else group_of([list(members).index(holder) for holder in held])
            if member in held:
                self._sets.append((names, group))

    def sum(self, units: Mapping[int, Unit]) -> None:
        """Replace every gradient by the sum over all holders of its weight."""
        copies: dict[str, list[torch.nn.Parameter]] = {}
        for unit in units.values():
            for name, weight in unit.weights.items():
                copies.setdefault(name, []).append(weight)
        for names, group in self._sets:
            flat = torch.cat([_local(copies[name]).reshape(-1) for name in names])
            if group is not None:
                dist.all_reduce(flat, group=group)
            parts = torch.split(flat, [copies[name][0].numel() for name in names])
            for name, part in zip(names, parts, strict=True):
                for weight in copies[name]:
                    weight.grad = part.reshape(weight.shape).clone()

    def totals(self, loss: float, units: Mapping[int, Unit]) -> tuple[float, float]:
        """Return the whole batch's loss and the norm of the whole gradient; the same on every rank to the bit."""
        own = torch.zeros(1 + len(self.names), dtype=torch.float64)
        own[0] = loss
        held = {name: weight for unit in units.values() for name, weight in unit.weights.items()}
        for place, name in enumerate(self.names, 1):
            weight = held.get(name)
            if weight is not None and weight.grad is not None and self.first[name] == self.member:
                own[place] = torch.linalg.vector_norm(weight.grad).double() ** 2
        dist.all_reduce(own)
        return float(own[0]), float(own[1:].sum().sqrt())


def _local(copies: Sequence[torch.nn.Parameter]) -> Tensor:
    """Sum of the gradients of one weight's copies on this rank."""
    found = [weight.grad for weight in copies if weight.grad is not None]
    return torch.stack(found).sum(0) if found else torch.zeros_like(copies[0])
