"""Causal attention over rows whose tokens lie on several ranks, with the work shared out evenly.

Rank p of P holds the tokens from ``p T/P`` to before ``(p+1) T/P``. Queries of p need keys of every r <= p, so later
ranks have more to do: in step t, rank p >= t computes its queries against the keys of p - t, which it fetched while it
computed the step before; rank p < t, which has run out of its own, computes the queries of P + p - t against its own
keys for it. That is 1 + floor(P / 2) steps where a ring takes P; in the last one half the ranks rest if P is even.
Partial results are merged by their log-sum-exp; the way back goes by the same schedule with the merged ones.

A block that is computed again on its way back does not repeat this: what attention gave is kept (``Stash``).
Source: Li et al. 2024, DISTFLASHATTN. Shapes: B rows, H heads, T tokens, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Pair = tuple[Tensor, Tensor]


@dataclass
class Stash:
    """Attention's outcome in a block's first pass, for its second; ``None`` where a block is passed only once."""

    kept: list[Pair] = field(default_factory=list)
    again: bool = False
    spared: int = 0

    def take(self) -> Pair | None:
        """Return what the first pass kept, in the second."""
        if not self.again:
            return None
        self.spared += 1
        return self.kept.pop(0)


def steps_of(ranks: int) -> int:
    """Steps after the first, in which every rank computes its own tokens."""
    return ranks // 2


def helped(rank: int, step: int, ranks: int) -> int | None:
    """Rank whose queries ``rank`` computes in a step; None: it computes its own, or rests."""
    if rank >= step or 2 * step == ranks:
        return None
    return ranks + rank - step


def work_of(rank: int, ranks: int) -> list[tuple[int, int]]:
    """(queries', keys') ranks of what a rank computes after the first step."""
    found = []
    for step in range(1, steps_of(ranks) + 1):
        other = helped(rank, step, ranks)
        if other is not None:
            found.append((other, rank))
        elif rank >= step:
            found.append((rank, rank - step))
    return found


def part(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Pair:
    """Attend to some keys; return the outcome (B, H, T, D) and its log-sum-exp (B, H, T, 1)."""
    scores = _scores(query, key, scale, causal)
    total = torch.logsumexp(scores, dim=-1, keepdim=True)
    return torch.exp(scores - total) @ _shared(value, query), total


def part_back(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    total: Tensor,
    delta: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values from some keys; ``total`` and ``delta`` are those of all keys."""
    weights = torch.exp(_scores(query, key, scale, causal) - total)
    inner = weights * (gradient @ _shared(value, query).transpose(-1, -2) - delta) * scale
    own = inner @ _shared(key, query)
    return own, _summed(inner.transpose(-1, -2) @ query, key), _summed(weights.transpose(-1, -2) @ gradient, value)


def merged(one: Pair, other: Pair) -> Pair:
    """Attention over two sets of keys, from that over each."""
    total = torch.logaddexp(one[1], other[1])
    return one[0] * torch.exp(one[1] - total) + other[0] * torch.exp(other[1] - total), total


def _scores(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    scores = (query @ _shared(key, query).transpose(-1, -2)) * scale
    if causal:
        length = query.shape[2]
        later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores


def _shared(key: Tensor, query: Tensor) -> Tensor:
    """Keys or values for every query head, where several share them."""
    return key.repeat_interleave(query.shape[1] // key.shape[1], 1)


def _summed(gradient: Tensor, key: Tensor) -> Tensor:
    rows, heads, length, width = gradient.shape
    return gradient.view(rows, key.shape[1], heads // key.shape[1], length, width).sum(2)


class _Line:
    """Messages of one pass; those of a step are posted before the step before it is computed."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.ranks = group, dist.get_rank(group), dist.get_world_size(group)
        self._works: list[tuple[Any, Tensor]] = []

    def send(self, tensors: tuple[Tensor, ...], target: int, tag: int) -> None:
        for index, tensor in enumerate(tensors):
            tensor = tensor.contiguous()
            work = dist.isend(tensor, group=self.group, group_dst=target, tag=8 * tag + index)
            self._works.append((work, tensor))

    def receive(self, shapes: tuple[Tensor, ...], source: int, tag: int) -> list[tuple[Any, Tensor]]:
        found = [torch.empty_like(shape, memory_format=torch.contiguous_format) for shape in shapes]
        return [
            (dist.irecv(tensor, group=self.group, group_src=source, tag=8 * tag + index), tensor)
            for index, tensor in enumerate(found)
        ]

    def finish(self) -> None:
        for work, _ in self._works:
            work.wait()


def _arrived(works: list[tuple[Any, Tensor]]) -> list[Tensor]:
    for work, _ in works:
        work.wait()
    return [tensor for _, tensor in works]


class BalancedAttention(torch.autograd.Function):
    """Causal attention of this rank's queries to all tokens up to each."""

    @staticmethod
    def forward(
        context: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, group: Any, stash: Any
    ) -> Tensor:
        """Return the outcome for this rank's tokens (B, H, T/P, D)."""
        before = stash.take() if stash is not None else None
        outcome = before or _forward(query, key, value, scale, group)
        if stash is not None and before is None:
            stash.kept.append(outcome)
        context.save_for_backward(query, key, value, *outcome)
        context.scale, context.group = scale, group
        return outcome[0]

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Return the gradients of this rank's queries, keys and values."""
        query, key, value, output, total = context.saved_tensors
        found = _backward(query, key, value, gradients[0], output, total, context.scale, context.group)
        return (*found, None, None, None)


def _posted(line: _Line, step: int, own: tuple[Tensor, ...], query: tuple[Tensor, ...]) -> list[tuple[Any, Tensor]]:
    """Post a step's messages: keys to whoever fetches them, queries to whoever helps; return what will arrive."""
    rank, ranks = line.rank, line.ranks
    if not 0 < step <= steps_of(ranks):
        return []
    if rank + step < ranks:
        line.send(own, rank + step, 2 * step)
    helper = rank + step - ranks
    if helper >= 0 and helped(helper, step, ranks) == rank:
        line.send(query, helper, 2 * step)
    other = helped(rank, step, ranks)
    if other is not None:
        return line.receive(query, other, 2 * step)
    return line.receive(own, rank - step, 2 * step) if rank >= step else []


def _forward(query: Tensor, key: Tensor, value: Tensor, scale: float, group: dist.ProcessGroup) -> Pair:
    line = _Line(group)
    rank, ranks = line.rank, line.ranks
    works = _posted(line, 1, (key, value), (query,))
    outcome, returning = part(query, key, value, scale, True), []
    for step in range(1, steps_of(ranks) + 1):
        arrived = _arrived(works)
        works = _posted(line, step + 1, (key, value), (query,))
        other, helper = helped(rank, step, ranks), rank + step - ranks
        if helper >= 0 and helped(helper, step, ranks) == rank:
            returning.append(line.receive(outcome, helper, 2 * step + 1))
        if other is not None:
            line.send(part(arrived[0], key, value, scale, False), other, 2 * step + 1)
        elif rank >= step:
            outcome = merged(outcome, part(query, arrived[0], arrived[1], scale, False))
    for each in returning:
        output, total = _arrived(each)
        outcome = merged(outcome, (output, total))
    line.finish()
    return outcome


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    output: Tensor,
    total: Tensor,
    scale: float,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    line = _Line(group)
    rank, ranks = line.rank, line.ranks
    delta = (gradient * output).sum(-1, keepdim=True)
    asked = (query, gradient, total, delta)
    works = _posted(line, 1, (key, value), asked)
    found = list(part_back(query, key, value, gradient, total, delta, scale, True))
    returning: list[tuple[int, list[tuple[Any, Tensor]]]] = []
    for step in range(1, steps_of(ranks) + 1):
        arrived = _arrived(works)
        works = _posted(line, step + 1, (key, value), asked)
        other, helper = helped(rank, step, ranks), rank + step - ranks
        if helper >= 0 and helped(helper, step, ranks) == rank:
            returning.append((0, line.receive((query,), helper, 2 * step + 1)))
        if rank + step < ranks:
            returning.append((1, line.receive((key, value), rank + step, 2 * step + 1)))
        if other is not None:
            asked_query, asked_gradient, asked_total, asked_delta = arrived
            theirs = part_back(asked_query, key, value, asked_gradient, asked_total, asked_delta, scale, False)
            line.send(theirs[:1], other, 2 * step + 1)
            found[1:] = [found[1] + theirs[1], found[2] + theirs[2]]
        elif rank >= step:
            own = part_back(query, arrived[0], arrived[1], gradient, total, delta, scale, False)
            found[0] = found[0] + own[0]
            line.send(own[1:], rank - step, 2 * step + 1)
    for first, each in returning:
        for index, tensor in enumerate(_arrived(each), first):
            found[index] = found[index] + tensor
    line.finish()
    return found[0], found[1], found[2]
