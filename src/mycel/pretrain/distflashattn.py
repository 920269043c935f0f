"""DistFlashAttn (Li et al. 2024): a row's tokens on several ranks, with causal attention shared out evenly.

    step 0:             every rank attends within its own tokens
    step t = 1 .. P/2:  rank p >= t: its queries, keys of p - t;  rank p < t: queries of P + p - t, its own keys, for it
    merged:             o = sum o_i exp(l_i - l), l = log sum exp l_i; the way back goes by the same steps with l and o
    overlap:            a step's messages are posted before the step before it is computed
    checkpointing:      a block that is computed again takes attention's outcome from its first pass, so neither its
                        computing nor its messages are repeated

``layout.attention = "balanced"`` with ``layout.sequence``. Attention within a step is plain matrix products here, not a
fused kernel; the paper's speed-ups of fused kernels on GPUs are not reproduced.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mycel.collectives.apply import lay_out
from mycel.collectives.balanced_attention import BalancedAttention, work_of
from mycel.collectives.ranks import make_ranks
from mycel.collectives.step import Trainer
from mycel.collectives.together import together
from mycel.collectives.traffic import Traffic
from mycel.pretrain.activation_memory import small
from mycel.recipe.schema import Layout
from mycel.rounds.laboratory import Measured

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory


def deviation(device: torch.device, heads: int = 4, keys: int = 2, length: int = 32) -> float:
    """Return how far a rank's outcome and gradients lie from those of full causal attention, relatively."""
    source, ranks, rank = torch.Generator().manual_seed(3), dist.get_world_size(), dist.get_rank()

    def drawn(count: int) -> Tensor:
        return torch.randn(2, count, length, 8, generator=source, dtype=torch.float64, requires_grad=True)

    whole = [drawn(heads), drawn(keys), drawn(keys)]
    weight = torch.randn(2, heads, length, 8, generator=source, dtype=torch.float64)
    full = [whole[0], *(each.repeat_interleave(heads // keys, 1) for each in whole[1:])]
    outcome = nn.functional.scaled_dot_product_attention(full[0], full[1], full[2], is_causal=True, scale=0.3)
    (outcome * weight).sum().backward()  # type: ignore[no-untyped-call]

    def own(tensor: Tensor) -> Tensor:
        return tensor.detach().chunk(ranks, dim=2)[rank].clone()

    parts = [own(each).requires_grad_(True) for each in whole]
    found: Tensor = BalancedAttention.apply(*parts, 0.3, dist.group.WORLD, None)  # type: ignore[no-untyped-call]
    (found * own(weight)).sum().backward()  # type: ignore[no-untyped-call]
    pairs = [(found, outcome), *((part.grad, each.grad) for part, each in zip(parts, whole, strict=True))]
    return max(
        float((mine.detach() - own(theirs)).norm() / own(theirs).norm())
        for mine, theirs in pairs
        if mine is not None and theirs is not None
    )


def costs(device: torch.device) -> dict[str, Any]:
    """Take gradients over rows of 512 tokens by both kinds of attention; return seconds of this core, and bytes."""
    rows = torch.randint(0, 64, (1, 512), generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {"apart": deviation(device)}
    for kind in ("gathered", "balanced"):
        for again in (False, True):
            layout = Layout.model_validate({"sequence": dist.get_world_size(), "attention": kind, "recompute": again})
            ranks = make_ranks(layout, device)
            stage = lay_out(small(2), ranks)
            trainer = Trainer(stage, ranks, torch.optim.SGD(stage.parameters(), lr=0.1))
            trainer.gradients(rows)
            seconds = []
            for _ in range(5):
                began = time.process_time()
                trainer.gradients(rows)
                seconds.append(time.process_time() - began)
            with Traffic() as traffic:
                trainer.gradients(rows)
            name = f"{kind}{'_again' if again else ''}"
            found |= {f"{name}_seconds": sorted(seconds)[2], f"{name}_bytes": traffic.bytes}
    return found


def claim(lab: Laboratory) -> Measured:
    """Equal to full attention at 1, 2 and 4 ranks; no rank of 4 computes more than 3 blocks; nothing is sent twice."""
    apart = max(max(together(ranks, deviation)) for ranks in (1, 2, 4))
    found = together(4, costs)
    most = 1 + max(len(work_of(rank, 4)) for rank in range(4))

    def worst(name: str) -> float:
        return max(float(each[name]) for each in found)

    ratio = worst("balanced_seconds") / worst("gathered_seconds")
    again = sum(each["balanced_again_bytes"] for each in found) / sum(each["balanced_bytes"] for each in found)
    twice = sum(each["gathered_again_bytes"] for each in found) / sum(each["gathered_bytes"] for each in found)
    return Measured(
        f"outcome and gradients at most {apart:.0e} from full attention's at 1, 2 and 4 ranks; of 4 the most loaded "
        f"computes {most} of 4 blocks of tokens; a step of its core takes {ratio:.2f} of that with gathered keys; with "
        f"blocks computed again {again:.2f} of the bytes are sent (gathered: {twice:.2f})",
        apart < 1e-9 and most == 3 and again < 1.001 < twice,
        {"apart": apart, "seconds_ratio": ratio, "bytes_again": again},
    )
