"""FusionLLM: a decoder's operators over machines far apart, and the slow links alone carry less.

Tang et al. 2024, "FusionLLM: A Decentralized LLM Training System on Geo-distributed GPUs with Adaptive Compression"
(catalogue number 70). Each machine computes a slice of the operator graph and differentiates it by itself; states go
forward, gradients come back (``segments.stages``). OP-Fence chooses machines and slices (``decisions.fencing``).
AdaTopK keeps on link e one entry in

    r_e = max(1, c r t_e / max t),     t_e: seconds of the link uncompressed;   c: bytes of an entry with its place

of activations and gradients alike, without error feedback; links for which that would save nothing stay dense.

Our reading: the formula's factor is 3 in the paper, for places of 8 bytes; here it is what places really take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mycel.decisions.fencing import Fence, Fenced, Spread, keeping, operators, transfer
from mycel.decisions.graph import Graph, graph_of
from mycel.decisions.timeline import pipeline, simulate
from mycel.models.sizes import SIZES
from mycel.rounds.laboratory import Measured
from mycel.segments.stages import Stages, train
from mycel.wire.codecs.topk import index_type

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory

ROWS, LENGTH, PIECES = 4, 64, 2
RATIO = 8.0  # r, by which the slowest link is squeezed
STEPS = 60


def shape() -> LlamaConfig:
    """Eight narrow blocks over the built-in vocabulary."""
    config: LlamaConfig = SIZES["tiny"].config()
    config.update({"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 8, "head_dim": 24})
    return config


@dataclass(frozen=True)
class Trial:
    """What a training over the fenced machines came to."""

    losses: list[float]
    bytes: list[int]
    seconds: float

    @property
    def last(self) -> float:
        """Mean loss of the last ten steps."""
        return sum(self.losses[-10:]) / len(self.losses[-10:])


def two_sites(graph: Graph, speed: float = 4e10) -> Spread:
    """Two machines at each of two places: 1 Gbit/s inside, 8 Mbit/s between, in no order."""
    near, far = 1.25e8, 1e6
    site = (0, 1, 0, 1)
    links = tuple(tuple(near if a == b else far for b in site) for a in site)
    pieces = operators(graph, ROWS * LENGTH // PIECES, speed)
    return Spread(pieces, (1.0,) * 4, (7e6,) * 4, links, 0.01)


def planned(seen: Spread, ratio: float) -> Fenced:
    """Slices for links of which the slowest will carry ``ratio`` times less."""
    slowest = min(width for row in seen.bandwidth for width in row)
    squeezed = tuple(tuple(width * ratio if width == slowest else width for width in row) for row in seen.bandwidth)
    return Fence().decide(replace(seen, bandwidth=squeezed))


def blocks_of(plan: Fenced) -> list[int]:
    """Blocks of each slice; a slice that ends inside a block keeps it, since less would cross before it than there."""
    edges = [0]
    for _, _, last in plan:
        edges.append(max(edges[-1], round((last - 1) / 6)))
    return [after - before for before, after in pairwise(edges)]


def shares(seen: Spread, plan: Fenced, ratio: float) -> list[float]:
    """What AdaTopK keeps on each link of a plan."""
    seconds = [transfer(seen, a[0], b[0], b[1]) - seen.latency for a, b in pairwise(plan)]
    count = int(seen.pieces[0].result) // 4
    return keeping(seconds, ratio, (4 + index_type(count).itemsize) / 4)


def codec(share: float) -> str:
    """Codec of a link that keeps a share of its entries."""
    return "raw" if share == 1.0 else f"topk({share!r})"


def trained(batches: Iterator[Tensor], seen: Spread, plan: Fenced, kept: list[float]) -> Trial:
    """Train from the same random weights over the planned machines and links."""
    torch.manual_seed(3)
    stages = Stages(LlamaForCausalLM(shape()), blocks_of(plan), [codec(share) for share in kept])
    losses = train(stages, batches, 2e-3, PIECES)
    each = [sent / len(losses) / PIECES / 2 for sent in stages.bytes()]
    widths = [seen.bandwidth[a[0]][b[0]] for a, b in pairwise(plan)]
    travel = [seen.latency + size / width for size, width in zip(each, widths, strict=True)]
    compute = [sum(p.seconds for p in seen.pieces[first:last]) / seen.speeds[d] / 3 for d, first, last in plan]
    course = simulate(pipeline(compute, [2 * seconds for seconds in compute], [*travel, 0.0], PIECES))
    return Trial(losses, stages.bytes(), course.seconds)


def text(lab: Laboratory, steps: int = STEPS) -> Iterator[Tensor]:
    """The same rows of running text for every arm."""
    from mycel.data.stream import sample_rows
    from mycel.pretrain.proving import pretraining

    table = (
        lab.world(lab.recipe("synchronous", pretraining({"model.base": "tiny"})), pooled=True).site.party(0, 0).examples
    )
    for step in range(steps):
        yield table.batch(sample_rows(len(table), step * ROWS, ROWS, 5).tolist(), 0).input_ids


def claim(lab: Laboratory) -> Measured:
    """Slow links crossed once; squeezing them alone is as fast as squeezing all, and costs less of the loss."""
    seen = two_sites(graph_of(shape(), LENGTH))
    plan = planned(seen, RATIO)
    kept = shares(seen, plan, RATIO)
    slow = [index for index, share in enumerate(kept) if share < 1]
    least = min(kept)
    arms = {
        name: trained(text(lab), seen, plan, each)
        for name, each in (("dense", [1.0] * len(kept)), ("adaptive", kept), ("uniform", [least] * len(kept)))
    }
    dense, adaptive, uniform = arms["dense"], arms["adaptive"], arms["uniform"]
    faster = dense.seconds / adaptive.seconds
    shrunk = dense.bytes[slow[0]] / adaptive.bytes[slow[0]]
    return Measured(
        f"{len(slow)} of {len(kept)} links is slow and carries {shrunk:.1f} times less; a step takes "
        f"{adaptive.seconds:.2f} s against {dense.seconds:.2f} ({faster:.1f} times as fast; every link squeezed "
        f"{uniform.seconds:.2f}); loss after {STEPS} steps {adaptive.last:.3f}, dense {dense.last:.3f}, every link "
        f"squeezed {uniform.last:.3f}",
        len(slow) == 1 and faster > 1.45 and adaptive.seconds <= 1.1 * uniform.seconds and adaptive.last < uniform.last,
        {
            "faster": faster,
            "shrunk": shrunk,
            "loss_dense": dense.last,
            "loss_adaptive": adaptive.last,
            "loss_uniform": uniform.last,
        },
    )
