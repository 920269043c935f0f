"""Activations under a budget: each block keeps, computes again or sends away what its way back needs.

    choose for each block a way w with bytes k_w, seconds t_w, and a_w needed again while it goes back:
    least sum t  subject to  sum k + max a <= layout.activation_mib

The ways are Chen et al. 2016 (recompute), Korthikanti et al. 2022 (selective: what lies between the matrix products)
and Ren et al. 2021 (offload, here to a file). An exact knapsack (`decisions/keeping.py`); bytes are those of a block
really passed before training, seconds nominal, as ranks must choose alike. With no budget everything is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaForCausalLM

from mycel.collectives.apply import fit, lay_out, named_weights
from mycel.collectives.ranks import make_ranks
from mycel.collectives.step import Trainer
from mycel.collectives.together import together
from mycel.decisions.keeping import MIB
from mycel.models.footprint import Footprint
from mycel.models.random_llama import llama_config
from mycel.recipe.schema import Layout
from mycel.rounds.laboratory import Measured

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory

ROWS, LENGTH, BLOCKS = 8, 64, 8


def small(blocks: int, hidden: int = 32) -> LlamaForCausalLM:
    """Return a decoder with a small vocabulary, so that its blocks hold most of what is kept."""
    torch.manual_seed(5)
    return LlamaForCausalLM(llama_config(hidden, blocks, 64, 3 * hidden))


def held_by(device: torch.device, shares: Sequence[float]) -> list[dict[str, Any]]:
    """Take a gradient under each budget, a share of what keeping everything takes; 0: no budget.

    Predicted and measured are bytes at the peak, without weights and their gradients; the knapsack foretells those of
    the blocks, and the head's are taken from the run without a budget.
    """
    rows = torch.randint(0, 64, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    found: list[dict[str, Any]] = []
    whole = blocks = 0.0
    for share in shares:
        layout = Layout(activation_mib=share * blocks / MIB)
        ranks = make_ranks(layout, device)
        stage = lay_out(small(BLOCKS, 64), ranks, (ROWS, LENGTH))
        trainer = Trainer(stage, ranks, torch.optim.SGD(stage.parameters(), lr=0.1))
        trainer.gradients(rows)  # gradients have their place from here on
        with Footprint() as footprint:
            trainer.gradients(rows)
        if not share:
            blocks = fit(stage, ranks, (ROWS, LENGTH), limit=float("inf"))
            whole = footprint.peak - blocks
        predicted = whole + (
            blocks if not share else fit(stage, ranks, (ROWS, LENGTH), limit=layout.activation_mib * MIB)
        )
        found.append(
            {
                "share": share,
                "budget": whole + share * blocks if share else 0.0,
                "predicted": predicted,
                "measured": footprint.peak,
                "ways": stage.held()[0].keeping,
                "norm": sum(
                    float(weight.grad.norm()) for weight in named_weights(stage).values() if weight.grad is not None
                ),
            }
        )
    return found


def claim(lab: Laboratory) -> Measured:
    """Budgets of 0.8, 0.5 and 0.3 of everything: kept to, foretold, at the same gradients."""
    [found] = together(1, lambda device: held_by(device, (0.0, 0.8, 0.5, 0.3)))
    off = max(abs(each["measured"] - each["predicted"]) / each["measured"] for each in found)
    within = all(each["measured"] <= 1.05 * each["budget"] for each in found[1:])
    same = len({each["norm"] for each in found}) == 1
    peaks = ", ".join(
        f"{each['measured'] / MIB:.1f} ({each['share']:g}: {_counted(each['ways'])})" for each in found[1:]
    )
    return Measured(
        f"peak {found[0]['measured'] / MIB:.1f} MiB with everything kept; under budgets {peaks} MiB; foretold within "
        f"{100 * off:.0f} %, gradients {'the same to the bit' if same else 'not the same'}",
        within and same and off <= 0.15,
        {"error": off, **{f"peak_{each['share']:g}": float(each["measured"]) for each in found}},
    )


def _counted(ways: Sequence[str]) -> str:
    return " + ".join(f"{ways.count(way)} {way}" for way in dict.fromkeys(ways))
