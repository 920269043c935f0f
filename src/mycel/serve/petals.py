"""Petals: a model over volunteers' machines that come and go.

Borzunov et al., "Petals: Collaborative Inference and Fine-tuning of Large Models" and "Distributed Inference and
Fine-tuning of Large Language Models Over The Internet", 2022-2023.

Each server holds a contiguous run of blocks and announces it; a client holds embedding and head, finds the fastest
chain (Dijkstra over latency and computing time), and sends the hidden state of every new token through it. Servers
keep a session's keys and values; the client keeps every input it sent. When a server is lost, another one gets these
inputs in one call and goes on; all others are left alone. States cross as blocks of 8-bit integers. A server joins
where the swarm's throughput is least and moves for a gain of 20 %. Prompts are tuned through the frozen chain:
gradients come back over the same cuts, and the servers' weights stay as they are.

Servers push states to each other and answer the client beside that, who keeps every input to survive a loss.

Here: ``segments.client`` and ``segments.crossing`` (sessions, pushing and replay), ``decisions.routing``,
``decisions.placement``, ``segments.training``, ``engines.peers_zenoh``. With one server that holds all blocks and the
codec ``raw`` it is plain decoding.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mycel.decisions.placement import Held, Neediest, Range, Situation, served
from mycel.engines.peers_memory import MemoryPeers, MemorySwarm
from mycel.models.cut import Cut
from mycel.rounds.laboratory import Laboratory, Measured
from mycel.segments.client import SwarmModel, Turn, fingerprint
from mycel.segments.host import Host
from mycel.segments.segment import Segment
from mycel.segments.session import Session
from mycel.segments.training import Chain

PROMPTS = ("def main", "Return the", "A string that")
TOKENS, KILL_AT = 24, 8
SERVERS = 5  # of the placement that is compared with the best possible


class Bench(NamedTuple):
    """A swarm in memory: its servers and a client."""

    swarm: MemorySwarm
    hosts: dict[str, tuple[Host, MemoryPeers]]
    model: SwarmModel


@asynccontextmanager
async def volunteers(folder: Path, ranges: tuple[Range, ...], codec: str = "raw") -> AsyncIterator[Bench]:
    """Open a swarm in memory whose servers hold ``ranges``."""
    swarm = MemorySwarm()
    door, hosts = await swarm.join("client"), dict[str, tuple[Host, MemoryPeers]]()
    model = await SwarmModel.open(door, folder, codec)
    try:
        for index, (first, last) in enumerate(ranges):
            member = await swarm.join(f"server-{index}")
            cut = Cut.open(folder, first, last, embed=False, head=False)
            host = Host(member, Segment(cut), fingerprint(folder))
            hosts[member.name] = host, member
            await host.start()
        yield Bench(swarm, hosts, model)
    finally:
        await model.close()
        for host, member in hosts.values():
            await host.close()
            await member.close()
        await door.close()


def claim(lab: Laboratory) -> Measured:
    """Measure what a lost server costs, what 8-bit states cost, how good placements are, and prompts' gradients."""
    base = lab.open_base()
    prompts = [base.tokenizer(text).input_ids for text in PROMPTS]
    alone = [_alone(base.model, prompt) for prompt in prompts]
    depth = int(base.model.config.num_hidden_layers)
    half = depth // 2
    ranges = ((0, half), (half, depth), (0, half), (half, depth))
    same, replayed, sent = asyncio.run(_survive(base.folder, ranges, prompts, alone))
    share, worse = asyncio.run(_squeezed(base.folder, ranges, prompts, alone))
    balance = _balance()
    error, moved = asyncio.run(_tuned(base.folder, base.model, ranges, prompts[1]))
    holds = same and replayed == sent and share <= 0.3 and abs(worse) < 0.01 and balance >= 0.9
    return Measured(
        f"killed server: {'the same' if same else 'other'} tokens, {replayed} positions sent again, all into its own"
        f" blocks; int8 states take {share:.2f} of the bytes for {100 * worse:+.2f} % perplexity; placements reach"
        f" {balance:.2f} of the best; prompts' gradients within {error:.1g}, servers' weights"
        f" {'moved' if moved else 'untouched'}",
        bool(holds and error < 1e-5 and not moved),
        {"identical": float(same), "replayed": replayed, "int8_bytes": share, "int8_perplexity": worse,
         "balance": balance, "gradient_error": error},
    )  # fmt: skip


def _alone(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


async def _survive(
    folder: Path, ranges: tuple[Range, ...], prompts: list[list[int]], alone: list[list[int]]
) -> tuple[bool, int, int]:
    async with volunteers(folder, ranges) as bench:
        sessions, new, found = [Session() for _ in prompts], prompts, [list[int]() for _ in prompts]
        lost = 0
        for step in range(TOKENS):
            if step == KILL_AT:
                lost = sum(len(session.hops[1].inputs) for session in sessions) + len(sessions)
                bench.hosts[sessions[0].hops[1].leg.peer][1].kill()
            logits = await bench.model.step([Turn(s, t) for s, t in zip(sessions, new, strict=True)])
            new = [[int(row)] for row in logits.argmax(-1)]
            for tokens, more in zip(found, new, strict=True):
                tokens += more
        return found == alone, sum(session.replayed for session in sessions), lost


async def _squeezed(
    folder: Path, ranges: tuple[Range, ...], prompts: list[list[int]], alone: list[list[int]]
) -> tuple[float, float]:
    """Return the bytes of 8-bit states over those of float32, and the relative change of perplexity."""
    results = []
    for codec in ("raw", "int8"):
        async with volunteers(folder, ranges, codec) as bench:
            losses = []
            for prompt, tokens in zip(prompts, alone, strict=True):
                ids = prompt + tokens
                logits = await bench.model.step([Turn(Session(), ids, wanted=len(ids))])
                losses.append(cross_entropy(logits[:-1], torch.tensor(ids[1:])))
            payload = bench.model.boundary.sent / bench.model.boundary.numbers
            results.append((payload, float(torch.stack(losses).mean().exp())))
    (raw, plain), (squeezed, rough) = results
    return squeezed / raw, rough / plain - 1


def _balance() -> float:
    """Return the least share of the best possible throughput, over random swarms that join and then move."""
    source, worst = random.Random(0), 1.0
    for _ in range(6):
        depth = source.randint(4, 6)
        sizes = [(source.randint(2, 4), source.uniform(5, 20)) for _ in range(SERVERS)]
        decision, places = Neediest(), dict[int, Range]()
        for _ in range(4):
            for index, (room, speed) in enumerate(sizes):
                others = tuple(Held(str(i), *places[i], sizes[i][1]) for i in places if i != index)
                places[index] = decision.decide(Situation(depth, room, speed, others, places.get(index)))
        spots = [[(f, f + min(room, depth)) for f in range(depth - min(room, depth) + 1)] for room, _ in sizes]
        best = max(_throughput(depth, sizes, dict(enumerate(combo))) for combo in itertools.product(*spots))
        if best:
            worst = min(worst, _throughput(depth, sizes, places) / best)
    return worst


def _throughput(depth: int, sizes: list[tuple[int, float]], places: dict[int, Range]) -> float:
    held = tuple(Held(str(index), *place, sizes[index][1]) for index, place in places.items())
    return served(Situation(depth, 1, 0.0, held), None)[0]


async def _tuned(folder: Path, model: torch.nn.Module, ranges: tuple[Range, ...], ids: list[int]) -> tuple[float, bool]:
    """Return how far two clients' prompt gradients are from local ones, and whether a server's weights moved."""
    cut = Cut.of(model)
    tokens = torch.tensor([ids * 4])
    starts = [
        torch.randn(1, 4, int(cut.config.hidden_size), generator=torch.Generator().manual_seed(s)) for s in (0, 1)
    ]
    async with volunteers(folder, ranges) as bench:
        before = [p.sum().item() for host, _ in bench.hosts.values() for p in host.segment.cut.parameters()]
        found = await asyncio.gather(*(_gradient(cut, tokens, start, Chain(bench.model)) for start in starts))
        after = [p.sum().item() for host, _ in bench.hosts.values() for p in host.segment.cut.parameters()]
    right = [await _gradient(cut, tokens, start, None) for start in starts]
    gaps = [float((f - r).norm() / r.norm()) for f, r in zip(found, right, strict=True)]
    return max(gaps), before != after


async def _gradient(cut: Cut, ids_BT: Tensor, start: Tensor, chain: Chain | None) -> Tensor:
    """Return the gradient of the loss at a soft prompt, through the peers or through local blocks."""
    prompt = start.clone().requires_grad_()
    hidden = torch.cat([prompt, cut.embed(ids_BT)], 1)
    made = await chain.forward(hidden) if chain else cut.run(hidden)
    tail = made.detach().requires_grad_() if chain else made
    logits = cut.head(tail)[:, prompt.shape[1] : -1]
    cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    if chain:
        assert tail.grad is not None
        hidden.backward(await chain.backward(tail.grad))  # type: ignore[no-untyped-call]
    assert prompt.grad is not None
    return prompt.grad
