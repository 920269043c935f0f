"""The laws of guards that hide answers, and of filters that distrust them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import torch

from mycel.errors import ParcelError
from mycel.guard.contract import Guard, Opened, PartyGuard, Post, Sealed
from mycel.guard.filters import Evidence, Filter
from mycel.testing.laws import law
from mycel.wire.parcel import Parcel, Tensors

Shapes = dict[str, tuple[int, ...]]


def check_guard(
    make: Callable[[Shapes, Mapping[int, int]], Guard], party: PartyGuard, tolerance: float, parties: int = 5
) -> None:
    """Hold a hiding guard's two halves to their contract; raise ``AssertionError`` with the law they break.

    Parameters
    ----------
    make : callable
        Makes the coordinator's half for given shapes and weights.
    party : PartyGuard
        The party's half.
    tolerance : float
        Largest error of an element of the opened mean; updates have elements up to about 0.1.
    """
    shapes: Shapes = {"a": (3, 4), "b": (5,)}
    weights = {node: node + 1 for node in range(parties)}
    updates = {node: _update(shapes, node) for node in range(parties)}
    for gone in (set[int](), {parties - 1}):
        guard = make(shapes, weights)
        try:
            opened, sent = asyncio.run(_play(guard, party, updates, weights, gone))
        finally:
            guard.close()
        stayed = [node for node in updates if node not in gone]
        law(opened.within == len(stayed), "updates within the bound are counted")
        law(opened.weight == sum(weights[node] for node in stayed), "the weight is that of the answers that arrived")
        for name in shapes:
            wanted = sum(weights[node] * updates[node][name] for node in stayed) / opened.weight
            gap = float((opened.total[name] / opened.weight - wanted).abs().max())
            law(gap <= tolerance, f"what is opened is the sum of what was hidden: {name!r} is off by {gap:.2g}")
        for node, parcel in sent.items():
            plain = torch.cat([updates[node][name].reshape(-1) for name in sorted(shapes)])
            for tensor in parcel.tensors.values():
                row = tensor.reshape(-1)[: len(plain)].double()
                alike = len(row) == len(plain) and torch.corrcoef(torch.stack([row, plain.double()]))[0, 1].abs() > 0.95
                law(not alike, "what leaves is not the update, nor a multiple of it")
    guard = make(shapes, weights)
    try:
        asyncio.run(_prepare(guard, party, weights))
    finally:
        guard.close()
    for strange in (Parcel("answer"), Parcel("answer", {"samples": 1}, {"sealed/sum": torch.zeros(2)})):
        try:
            guard.check(0, strange)
        except ParcelError:
            continue
        law(False, "an answer of another form is refused")


async def _prepare(guard: Guard, party: PartyGuard, nodes: Mapping[int, int]) -> dict[int, Tensors]:
    kept: dict[int, Tensors] = {}
    await guard.prepare(_post(party, kept, set()), sorted(nodes))
    return kept


def _post(party: PartyGuard, kept: dict[int, Tensors], gone: set[int]) -> Post:
    async def post(messages: Mapping[int, Parcel]) -> dict[int, Parcel]:
        answers = {}
        for node, message in messages.items():
            if node not in gone:
                read = Parcel.from_bytes(message.to_bytes())
                answer, kept[node] = party.answer(node, read, kept.get(node, {}))
                answers[node] = Parcel.from_bytes(answer.to_bytes())
        return answers

    return post


async def _play(
    guard: Guard, party: PartyGuard, updates: Mapping[int, Tensors], weights: Mapping[int, int], gone: set[int]
) -> tuple[Opened, dict[int, Parcel]]:
    kept: dict[int, Tensors] = {}
    present = await guard.prepare(_post(party, kept, set()), sorted(updates))
    sent = {}
    for node in present:
        if node not in gone:
            hidden, kept[node] = party.seal(node, updates[node], weights[node], True, guard.terms(), kept[node])
            parcel = Parcel("answer", {"samples": weights[node]}, hidden)
            sent[node] = Parcel.from_bytes(parcel.to_bytes())
            guard.check(node, sent[node])
    sealed = [Sealed(node, parcel, weights[node]) for node, parcel in sent.items()]
    return await guard.open(_post(party, kept, gone), sealed), sent


def _update(shapes: Shapes, node: int) -> Tensors:
    source = torch.Generator().manual_seed(node)
    return {name: 0.05 * torch.randn(shape, generator=source) for name, shape in shapes.items()}


def check_filter(judge: Filter, counts: Sequence[int] = (3, 6, 11)) -> None:
    """Hold a filter to its contract: finite shares of 0 or more, the same whatever the order of the rows."""
    for count in counts:
        source = torch.Generator().manual_seed(count)
        rows = torch.randn(40, generator=source) + 0.3 * torch.randn(count, 40, generator=source)
        weights, order = torch.arange(1.0, count + 1), torch.randperm(count, generator=source)
        seen = Evidence(rows, weights, rows.mean(0), rows)
        plain, turned = judge.judge(seen), judge.judge(Evidence(rows[order], weights[order], rows.mean(0), rows[order]))
        law(plain.shares.shape == (count,), "there is a share for each row")
        law(bool(plain.shares.isfinite().all()) and bool((plain.shares >= 0).all()), "shares are finite, 0 or more")
        law(
            torch.allclose(plain.shares[order], turned.shares, atol=1e-6), "the order of rows does not matter to shares"
        )
        if plain.centre is not None and turned.centre is not None:
            law(torch.allclose(plain.centre, turned.centre, atol=1e-6), "nor to the centre")
