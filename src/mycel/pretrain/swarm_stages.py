"""SWARM: stages served by many unequal, unreliable peers; work finds its way, and peers go where they are needed.

Ryabinin et al. 2023, "SWARM Parallelism: Training Large Models Can Be Surprisingly Communication-Efficient".

    stochastic wiring   each micro-batch is sent to a peer of the next stage by interleaved weighted round-robin, so
                        that peers serve in proportion to their throughput (``decisions.wiring``)
    rebalancing         a peer of the stage with most to spare moves to the slowest, while that makes it faster
    losses              inputs and gradients are kept by the sender until the step ends; a lost peer's are redone

A step's gradient is the sum over all micro-batches wherever they were computed, so departures change time, not loss.
Not verified: the paper averages gradients over a stage's peers with an all-reduce that may itself fail; here the owner
collects them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from mycel.decisions.wiring import Crew, best_throughput, settled, throughput
from mycel.fleet.clock import run_virtual
from mycel.models.sizes import SIZES
from mycel.rounds.laboratory import Measured
from mycel.segments.stages import Stages
from mycel.segments.wired import Peer, Swarm

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory

PIECES, AT_ONCE = 12, 8
Departures = dict[int, tuple[str, ...]]  # peers that go while a step runs, by step


def peers(speeds: tuple[tuple[float, ...], ...]) -> list[Peer]:
    """One peer for each speed, in forwards a second, stage by stage."""
    return [
        Peer(f"{stage}-{place}", 1 / speed, stage)
        for stage, held in enumerate(speeds)
        for place, speed in enumerate(held)
    ]


def trained(
    batches: Iterator[Tensor], crew: list[Peer], departures: Departures, moving: bool
) -> tuple[list[float], list[float], Swarm]:
    """Train four blocks in as many stages; return losses, virtual seconds of each step, and the swarm."""
    torch.manual_seed(9)
    config = SIZES["tiny"].config()
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    model = LlamaForCausalLM(config)
    swarm = Swarm(Stages(model, [1] * 4), crew, seed=1, fetch=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses, seconds = list[float](), list[float]()

    async def course() -> None:
        loop = asyncio.get_running_loop()
        for step, rows in enumerate(batches):
            began = loop.time()
            optimizer.zero_grad(set_to_none=True)
            for place, name in enumerate(departures.get(step, ())):
                loop.call_later(6.0 + place, swarm.leave, name)
            losses.append(await swarm.gradients(rows, PIECES, AT_ONCE))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if moving:
                await swarm.rebalance()
            seconds.append(loop.time() - began)

    run_virtual(course())
    return losses, seconds, swarm


def rows(steps: int) -> Iterator[Tensor]:
    """Random rows, the same for every arm."""
    source = torch.Generator().manual_seed(6)
    for _ in range(steps):
        yield torch.randint(3, 2048, (PIECES, 16), generator=source)


def claim(lab: Laboratory) -> Measured:
    """Service in proportion to speed; peers lost change no loss; moves bring the throughput back near the best."""
    speeds = ((4.0, 2.0, 1.0), (3.0, 3.0, 1.0), (2.0, 2.0, 2.0, 1.0), (4.0, 3.0))
    gone: Departures = {2: ("3-0",), 4: ("1-0", "1-2")}
    quiet = trained(rows(10), peers(speeds), {}, moving=False)
    still = trained(rows(10), peers(speeds), gone, moving=False)
    moving = trained(rows(10), peers(speeds), gone, moving=True)
    apart = max(abs(a / b - 1) for a, b in zip(quiet[0], moving[0], strict=True))
    gain = sum(still[1][-4:]) / sum(moving[1][-4:])
    served = [peer.served for peer in quiet[2].peers[:3]]
    fair = max(abs(count / sum(served) / (speed / 7.0) - 1) for count, speed in zip(served, speeds[0], strict=True))
    ratios = _ratios()
    return Measured(
        f"peers of speeds 4, 2 and 1 served {served} requests; three peers left in mid-step, "
        f"{moving[2].redone} micro-batches were redone, losses lie {apart:.0e} from the undisturbed run's; "
        f"{moving[2].moves} moves made later steps {gain:.2f} times as fast as without; from chance places moves reach "
        f"{min(ratios):.2f} of the best assignment at worst, {sum(ratios) / len(ratios):.2f} on average",
        apart < 1e-5 and gain > 1 and fair < 0.15 and sum(ratios) / len(ratios) >= 0.9,
        {"apart": apart, "gain": gain, "fair": fair, "worst_ratio": min(ratios), "redone": moving[2].redone},
    )


def _ratios() -> list[float]:
    """Throughput after all moves over the best possible, for 40 crews of 8 peers at chance places."""
    chance, found = random.Random(2), []
    for _ in range(40):
        stages: list[list[float]] = [[], [], []]
        for _ in range(8):
            stages[chance.randrange(3)].append(chance.uniform(1, 4))
        crew = Crew(tuple(tuple(held) for held in stages))
        found.append(throughput(settled(crew)[0]) / best_throughput(crew))
    return found
