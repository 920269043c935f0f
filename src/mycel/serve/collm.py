"""CoLLM: devices that work on each token together, as many as help, with shares that suit them.

Li et al., "CoLLM: Collaborative LLM inference on edge devices by tensor parallelism", 2024.

On devices that are bound by computing, cutting by layers keeps one of them busy at a time. CoLLM splits heads and
feed-forward columns; a cost model over speeds, memory and links says *how many* devices make a token come soonest, and
shares are moved in whole heads as the devices' state changes, so that batteries run down together.

Here: ``decisions.collaboration`` and ``segments.ranks`` with unequal shares. With one device it is plain decoding.

Not verified: the paper's formulas; ours are stated in ``decisions.collaboration``. The link in its list of code leads
to an unrelated recommender.
"""

from __future__ import annotations

import itertools
import time

import torch

from mycel.decisions.collaboration import Devices, Lasting, Quickest, seconds_per_token, tokens_until_empty
from mycel.errors import EngineError
from mycel.models.cut import Cut
from mycel.models.random_llama import write_llama
from mycel.rounds.laboratory import Laboratory, Measured
from mycel.segments.mesh import Pace
from mycel.segments.ranks import Group, ranks
from mycel.serve.tpi_llm import add_up

HIDDEN, LAYERS = 768, 4
NEAR, FAR = Pace(), Pace(latency=0.02)
PROMPT = [7, 99, 12, 5, 300]


def claim(lab: Laboratory) -> Measured:
    """Compare the number of devices that the model predicts with the best that is measured; then batteries."""
    folder = write_llama(lab.folder / "collm", HIDDEN, LAYERS)
    alone = _seconds(Group(folder, (1.0,)))
    latency = add_up("star", Pace(), HIDDEN, 20) / 2
    heads = HIDDEN // 64
    told, found = [], []
    gap = 0.0
    for pace in (NEAR, FAR):
        speed = 1 / alone
        seen = Devices((speed, speed), (heads, heads), heads, LAYERS, 1.0, HIDDEN, latency + pace.latency, 1e9)
        told.append(sum(map(bool, Quickest().decide(seen))))
        two = _seconds(Group(folder, (1.0, 1.0), pace=pace))
        found.append(2 if two < alone else 1)
        gap = max(gap, two / seconds_per_token(seen, (heads // 2, heads // 2)))
    error = _unequal(folder)
    longer = _batteries()
    return Measured(
        f"near devices: {told[0]} foretold, {found[0]} measured; 20 ms apart: {told[1]} foretold, {found[1]}"
        f" measured; uneven shares give logits within {error:.1g}; batteries last {longer:.2f} times"
        f" as long for at most 20 %"
        " more time a token",
        told == found and error < 1e-4 and longer >= 1.3,
        {"near_told": told[0], "near_found": found[0], "far_told": told[1], "far_found": found[1], "error": error,
         "longer": longer, "measured_over_told": gap},
    )  # fmt: skip


def exact(seen: Devices) -> float:
    """Return the least seconds of a token over all ways to share out the heads."""
    choices = (range(min(room, seen.heads) + 1) for room in seen.room)
    sound = [each for each in itertools.product(*choices) if sum(each) == seen.heads]
    if not sound:
        raise EngineError("the heads do not fit")
    return min(seconds_per_token(seen, each) for each in sound)


def _seconds(group: Group) -> float:
    """Return the seconds of a token, the least of a few."""
    with ranks(group) as master:
        master.step(torch.tensor([PROMPT]))
        best = float("inf")
        for _ in range(6):
            started = time.perf_counter()
            master.step(torch.tensor([[3]]))
            best = min(best, time.perf_counter() - started)
        return best


def _unequal(folder: object) -> float:
    group = Group(folder, (5.0, 1.0))  # type: ignore[arg-type]
    with ranks(group) as master:
        found = master.step(torch.tensor([PROMPT]))[0]
    whole = Cut.open(group.folder)
    with torch.inference_mode():
        right = whole.head(whole.run(whole.embed(torch.tensor([PROMPT]))))[0, -1]
    return float((found - right).abs().max() / right.abs().max())


def _batteries() -> float:
    """Return how much longer the first battery lasts, over four devices alike but for their batteries."""
    seen = Devices((1e9,) * 4, (16,) * 4, 32, 12, 2e8, 512, 1e-4, 1e8, (900.0, 1100.0, 1300.0, 600.0), (0.01,) * 4)
    return tokens_until_empty(seen, Lasting().decide(seen)) / tokens_until_empty(seen, Quickest().decide(seen))
