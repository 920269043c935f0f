"""QSDP: data parallelism in which neither weights nor gradients ever travel in full precision.

Markov et al. 2023, "Quantized Distributed Training of Large Models with Convergence Guarantees" (catalogue number 48).

    to the islands:     Q(w) on a randomly shifted lattice, r one draw for a tensor:  delta round((w - r) / delta) + r
    to the coordinator: stochastic rounding of the gradient; both unbiased, in buckets, 8 bits, without error feedback
    coordinator:        w_{t+1} = AdamW(w_t, sum_k C(g_k) / sum_k n_k), the master weights in full precision

The two quantisers are codecs of the wire: ``wire.brief_codec = "lattice(8)"`` and ``wire.codec = "rounding(8)"``. With
both set to "raw" this is synchronous data parallelism, to the bit. Vectors (norms) travel in full precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mycel.errors import RecipeError
from mycel.pretrain.synchronous import Synchronous
from mycel.rounds.laboratory import Measured

if TYPE_CHECKING:
    from mycel.recipe.schema import Recipe
    from mycel.rounds.laboratory import Laboratory

SHRINKS = {"wire.brief_codec": "lattice(8)", "wire.codec": "rounding(8)"}


class Qsdp(Synchronous):
    """Synchronous steps over unbiased quantisers."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        if recipe.wire.error_feedback:
            raise RecipeError(
                "wire.error_feedback is on, and the system 'qsdp' relies on unbiased quantisers alone: switch it off"
            )


def claim(lab: Laboratory) -> Measured:
    """A quarter of the bytes, a loss within 1 % of full precision; rounding to 4 bits without a shift is worse."""
    from mycel.pretrain.proving import pretraining, training_bytes

    steps = {"rounds.count": 160}
    plain = lab.run(lab.recipe("synchronous", pretraining(steps)))
    small = lab.run(lab.recipe("qsdp", pretraining({**steps, **SHRINKS})))
    ratio = training_bytes(small) / training_bytes(plain)
    excess = small.loss() / plain.loss() - 1
    faster = plain.virtual_seconds / small.virtual_seconds
    return Measured(
        f"{ratio:.3f} of the bytes and {faster:.1f} times as fast on thin links; loss {small.loss():.3f} against "
        f"{plain.loss():.3f} ({excess:+.2%}) after 160 steps",
        ratio <= 0.27 and abs(excess) <= 0.01,
        {"ratio": ratio, "excess": excess, "speed_up": faster},
    )
