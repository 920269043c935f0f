"""HetHub: unequal accelerators in one pipeline, each with as many blocks as its speed bears.

Xu et al. 2024, "HETHUB: A Distributed Training System with Heterogeneous Cluster for Large-Scale Models" (catalogue
number 77). Three parts:

    predictor      a step's seconds from each kind's speed, memory and links (``decisions.accelerators``)
    planner        tensor ranks inside a node of one kind, kinds joined by the pipeline, blocks not evenly shared out
    communicator   one interface over unlike transports: here parcels, whose bytes are the same on every machine

Not verified: the paper's planner is known from its abstract. Ours tries every order, width and number of copies, and
shares the blocks out exactly, where the paper moves blocks one by one from a start in proportion to speed.
"""

from __future__ import annotations

import torch

from mycel.decisions.accelerators import Arranging, Kind, Mixed, simulated
from mycel.rounds.laboratory import Laboratory, Measured

SLOW, FAST = Kind("slow", 4, 4, 1e14, 32e9), Kind("fast", 4, 4, 3e14, 80e9)
# Blocks of 4,096 numbers' width over rows of 2,048 tokens, in a step of 128 rows.
LARGE = Mixed(48, 3 * 2.5e12, 3.2e9, 0.25e9, 16.8e6, 1.25e10, (SLOW, FAST), 128)


def bound(seen: Mixed) -> float:
    """Seconds of a step if all accelerators together were never idle and sent nothing."""
    return seen.blocks * seen.flops * seen.micro_batches / sum(kind.count * kind.speed for kind in seen.kinds)


def claim(lab: Laboratory) -> Measured:
    """Speeds of one to three: near the sum of speeds, foretold, and the same losses as one machine."""
    plan, even = Arranging().decide(LARGE), Arranging(even=True).decide(LARGE)
    course = simulated(LARGE, plan)
    share, even_share = (bound(LARGE) / simulated(LARGE, each).seconds for each in (plan, even))
    off = abs(Arranging().cost(LARGE, plan) / course.seconds - 1)
    apart = losses_apart()
    return Measured(
        f"{share:.1%} of the sum of speeds, {even_share:.1%} with even blocks ({len(plan.stages)} stages in "
        f"{plan.copies} copies, blocks {plan.split}); predicted within {off:.1%} of the event "
        f"simulation; losses of a pipeline of 1 and 3 blocks lie {apart:.1e} from one machine's",
        share >= 0.95 and even_share <= 0.7 and off <= 0.1 and apart < 1e-5,
        {"share": share, "share_even": even_share, "off": off, "apart": apart},
    )


def losses_apart(steps: int = 4) -> float:
    """Largest relative difference between the losses of unequal stages and of the uncut model."""
    from mycel.models.sizes import SIZES
    from mycel.segments.stages import Stages, train

    curves: list[list[float]] = []
    for split in ([4], [1, 3]):
        from transformers import LlamaForCausalLM

        torch.manual_seed(7)
        model = LlamaForCausalLM(SIZES["tiny"].config())
        source = torch.Generator().manual_seed(8)
        rows = (torch.randint(3, 2048, (4, 32), generator=source) for _ in range(steps))
        curves.append(train(Stages(model, split), rows, 1e-3, pieces=2 if len(split) > 1 else 1))
    whole, cut = curves
    return max(abs(a / b - 1) for a, b in zip(whole, cut, strict=True))
