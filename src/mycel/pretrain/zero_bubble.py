"""Zero-bubble pipelines (Qi et al. 2024): the way back is divided, and gradients of weights fill what was waited away.

    B: gradient of what entered a stage, for which others wait;  W: gradient of its weights, for which nobody does
    zero_bubble:  1F1B with W wherever a rank would wait; bubble (P-1)(f+b-w) a step, a third of 1F1B's where f = b = w
    zbv:          two stages a rank, p and 2 P - 1 - p, there and back; no bubble where f = b = w and M >= 2 P

``layout.schedule = "zero_bubble"`` (any ``layout.chunks``) or ``"zbv"`` (two). The paper's optimiser step without a
barrier, rolled back when the gradient proves too long, is not built: the step ends with one sum over all ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mycel.pretrain.breadth_first import judged

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory, Measured


def claim(lab: Laboratory) -> Measured:
    """Four ranks: the bubble of 1F1B falls to what the formulas say, at gradients of one process."""
    return judged([("1f1b", 8, 1), ("zero_bubble", 8, 1), ("zbv", 8, 2)])
