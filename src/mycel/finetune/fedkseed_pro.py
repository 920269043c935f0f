"""FedKSeed-Pro: seeds whose slopes have been steep are drawn more often.

Qin et al. 2024 (ICML; catalogue number 8): FedKSeed, with draws that are not uniform. The coordinator keeps, for every
seed, the mean magnitude a_j of the slopes it has been sent, scales these to [0, 1], and draws by their softmax:

    p_j = exp(sharpness u_j) / sum_i exp(sharpness u_i),   u_j = (a_j - min a) / (max a - min a)

A seed that nobody has drawn counts with the mean of the others. The odds travel as 2-byte whole numbers, so that both
ends draw alike to the last seed; they cost half of what the scalars cost, and the pool may be smaller in return.

With ``sharpness = 0`` this is FedKSeed, to the bit. Which normalisation the published runs use, and what they do about
seeds not drawn yet, could not be verified. Answers must belong to the odds at hand, so no pace that lets them be late.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from mycel.finetune.fedkseed import PLAIN, SCALARS, FedKSeed, FedKSeedKnobs
from mycel.rounds.laboratory import Measured
from mycel.rounds.system import Answer, Outcome, State
from mycel.wire.algebra import with_role
from mycel.wire.parcel import Parcel

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.world import World

ODDS, STEEPNESS, TIMES = "odds", "steepness", "times"
FINEST = 32_767  # largest odds of a seed: what two bytes hold


class FedKSeedProKnobs(FedKSeedKnobs):
    """Settings of FedKSeed-Pro."""

    seeds: int = Field(1024, ge=1, le=1 << 16, description="directions K in the pool; 6 bytes each in every brief")
    sharpness: float = Field(1.0, ge=0, description="how much likelier the steepest seed is; 0: all alike")


class FedKSeedPro(FedKSeed):
    """FedKSeed with odds that follow what slopes have been."""

    Knobs = FedKSeedProKnobs
    paces = ("synchronous", "sequential")

    def begin(self, world: World) -> State:
        """No seed has been drawn yet."""
        nothing = torch.zeros(self.knobs.seeds, dtype=torch.float64)
        start = {ODDS: torch.ones(self.knobs.seeds, dtype=torch.int16), STEEPNESS: nothing, TIMES: nothing.clone()}
        return super().begin(world).but(server=start)

    def brief(self, state: State, node: int) -> Parcel:
        """Tell the node the scalars and the odds."""
        told = super().brief(state, node)
        return Parcel(told.kind, told.header, told.tensors | with_role("server", {ODDS: state.server[ODDS]}))

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        """Credit slopes, and note how steep they were."""
        outcome = super().combine(state, answers)
        steepness, times = state.server[STEEPNESS].clone(), state.server[TIMES].clone()
        for answer in sorted(answers, key=lambda answer: answer.node):
            slopes, drawn = answer.tensors()[SCALARS].double().abs(), self.drawn(state, answer)
            steepness.index_add_(0, drawn, slopes)
            times.index_add_(0, drawn, torch.ones_like(slopes))
        odds = odds_of(steepness, times, self.knobs.sharpness)
        return Outcome(shared=outcome.shared, server={ODDS: odds, STEEPNESS: steepness, TIMES: times})

    def step(self, state: State, outcome: Outcome) -> State:
        """Add up, and change the odds."""
        return super().step(state, outcome).but(server=outcome.server)

    def odds(self, state: State) -> Tensor:
        """How likely each seed is to be drawn."""
        return state.server[ODDS]


def odds_of(steepness: Tensor, times: Tensor, sharpness: float) -> Tensor:
    """Return each seed's odds as whole numbers from 1 to 32,767, in lowest terms, as int16.

    Parameters
    ----------
    steepness, times : Tensor
        Sum of slope magnitudes per seed, and how often it was drawn.
    """
    seen = times > 0
    means = steepness / times.clamp(min=1)
    means[~seen] = means[seen].mean() if bool(seen.any()) else 0.0
    reach = float(means.max() - means.min())
    scaled = (means - means.min()) / reach if reach else torch.zeros_like(means)
    odds = (torch.exp(sharpness * (scaled - scaled.max())) * FINEST).round().clamp(1, FINEST).to(torch.int64)
    return (odds // math.gcd(*odds.tolist())).to(torch.int16)


def claim(lab: Laboratory) -> Measured:
    """Loss after the same steps as FedKSeed, whole model, equal pools, three seeds."""
    losses: dict[str, list[float]] = {"fedkseed": [], "fedkseed_pro": []}
    for seed in (1, 2, 3):
        for name, found in losses.items():
            changes = {**PLAIN, "model.base": "micro", "data.parties": "iid", "data.count": 2, "seed": seed}
            rates = {"rounds.count": 3, "rounds.local_steps": 60, "training.learning_rate": 3e-4}
            found.append(
                lab.run(
                    lab.recipe(name, {**changes, **rates, "training.batch_size": 4, "knobs": {"seeds": 128}})
                ).loss()
            )
    gains = [uniform - steep for uniform, steep in zip(losses["fedkseed"], losses["fedkseed_pro"], strict=True)]
    text = ", ".join(f"{-gain:+.4f}" for gain in gains)
    return Measured(
        f"after 180 steps a party the held-out loss differs from that of uniform draws by {text} nats (seeds 1, 2, 3)",
        min(gains) >= 0,
        {"least_gain": min(gains), "mean_gain": sum(gains) / len(gains)},
    )
