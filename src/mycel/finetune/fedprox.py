"""FedProx: a spring ties each party's training to the state that the round began from.

Li et al. 2020, "Federated Optimization in Heterogeneous Networks"; as one of the seven rules of Ye et al. 2024,
"OpenFedLLM" (catalogue number 21).

    party k:      minimises F_k(w) + (mu / 2) * |w - w_t|^2, so each gradient gains mu * (w - w_t)
    coordinator:  as federated averaging

With ``mu = 0`` this is federated averaging. Each local optimiser starts afresh every round, as it does there.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import nn

from mycel.finetune.fedavg import FedAvg, FedAvgKnobs
from mycel.rounds.drift import Drift
from mycel.rounds.laboratory import Measured
from mycel.wire.algebra import group
from mycel.wire.parcel import Parcel

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.party import Party
    from mycel.rounds.training import Correction


class FedProxKnobs(FedAvgKnobs):
    """Settings of FedProx."""

    mu: float = Field(0.01, ge=0, description="stiffness of the spring, loss per squared distance")


class FedProx(FedAvg):
    """Federated averaging with a proximal term at the parties."""

    Knobs = FedProxKnobs

    def correction(self, brief: Parcel, party: Party) -> Correction | None:
        """Pull each gradient towards the state that the brief carries."""
        anchor = group(brief.tensors, "shared")

        @torch.no_grad()
        def pull(parameters: Mapping[str, nn.Parameter]) -> None:
            for name, parameter in parameters.items():
                assert parameter.grad is not None
                parameter.grad.add_(parameter - anchor[name], alpha=self.knobs.mu)

        return pull


def claim(lab: Laboratory) -> Measured:
    """Under the spring the changes of one round point closer the same way than FedAvg's, and are shorter."""
    changes = {"rounds.count": 3, "rounds.local_steps": 8, "rounds.evaluate_every": 3}
    free, tied = Drift(), Drift()
    lab.run(lab.recipe("fedavg", changes), watch=free)
    lab.run(lab.recipe("fedprox", changes), watch=tied)
    gain = fmean(tied.agreements) - fmean(free.agreements)
    return Measured(
        f"mean cosine of parties' changes {fmean(tied.agreements):.3f} against FedAvg's {fmean(free.agreements):.3f}, "
        f"their length {fmean(tied.lengths):.2f} against {fmean(free.lengths):.2f}",
        gain > 0 and fmean(tied.lengths) < fmean(free.lengths),
        {"gain": gain, "agreement": fmean(tied.agreements), "agreement_fedavg": fmean(free.agreements)},
    )
