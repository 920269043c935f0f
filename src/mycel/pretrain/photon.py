"""Photon: federated pre-training in which islands come and go, and agree anyway.

Sani et al. 2024, "The Future of Large Language Model Pre-training is Federated" (catalogue number 31).

    round t:       K of P islands are drawn (``rounds.cohort``);  w_k = H steps of AdamW from w_t
    coordinator:   d = mean over those who answered of w_k - w_t;   w_{t+1} = Nesterov or averaging along d, as DiLoCo's
    watched:       the mean cosine between two islands' changes (consensus), and the norm of their mean

An island may be a cluster of its own (``[layout]``). Rates follow the rounds, not an island's own count of steps, so
one that sat out comes back to the schedule. With every island taking part this is DiLoCo. Islands that remember nothing
of their optimiser (``inner = "fresh"``) are the paper's; in rounds as short as can be run here, AdamW's first steps
without a memory undo what the round learns (loss 4.98 against 4.87 after 4 rounds of 64 steps, 4.99 before; seed 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import tomli_w

from mycel.pretrain.diloco import DiLoCo, mean_change
from mycel.rounds.laboratory import Measured
from mycel.rounds.system import Answer, Outcome, State
from mycel.wire.algebra import cosine, norm
from mycel.wire.parcel import Tensors

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory


class Photon(DiLoCo):
    """DiLoCo's outer step over whoever was drawn and answered."""

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        """Average what came, and note how much the islands agree."""
        mean = mean_change(answers)
        agreed = consensus([answer.tensors() for answer in sorted(answers, key=lambda each: each.node)])
        return Outcome(shared=mean, facts={"consensus": agreed, "change": norm(mean)})

    def step(self, state: State, outcome: Outcome) -> State:
        """DiLoCo's step; what was watched is kept."""
        return super().step(state, outcome).but(facts=outcome.facts)


def consensus(changes: Sequence[Tensors]) -> float:
    """Mean cosine over all pairs of changes; 1 for one alone."""
    cosines = [cosine(one, other) for one, other in combinations(changes, 2)]
    return sum(cosines) / len(cosines) if cosines else 1.0


ISLANDS, ROUNDS, STEPS = 8, 8, 32


def claim(lab: Laboratory) -> Measured:
    """Half of eight islands drawn in a round and one of them dropping out: at most 5 % worse at equal tokens."""
    from mycel.pretrain.proving import pretraining

    changes: dict[str, Any] = {"data.count": ISLANDS, "data.examples": 500, "rounds.local_steps": STEPS}
    whole = lab.recipe("photon", pretraining({**changes, "rounds.count": ROUNDS, "fleet.devices": "equal"}))
    path = lab.folder / "leaving.toml"
    # Of four islands that are drawn, one answer a round is lost on average.
    devices = [{"name": f"isle-{index}", "gflops": 50.0, "reliability": 0.75} for index in range(ISLANDS)]
    path.write_text(tomli_w.dumps({"device": devices}), encoding="utf-8")
    leaving = {**changes, "rounds.cohort": 0.5, "rounds.quorum": 0.25, "fleet.devices": str(path)}
    full = lab.run(whole)
    # As many tokens, those included that were lost with their answers; and as many rounds, with half the tokens.
    equal = lab.run(lab.recipe("photon", pretraining({**leaving, "rounds.count": 2 * ROUNDS})))
    rounds = lab.run(lab.recipe("photon", pretraining({**leaving, "rounds.count": ROUNDS})))
    lost = equal.progress.drops["lost"] / (2 * ROUNDS)
    excess, excess_rounds = (lab.mixture(each) / lab.mixture(full) - 1 for each in (equal, rounds))
    return Measured(
        f"half of {ISLANDS} islands a round, {lost:.2f} of their answers lost in each: loss {excess:+.1%} beside full "
        f"participation ({lab.mixture(full):.3f}) at equal tokens, {excess_rounds:+.1%} after as many rounds; "
        f"consensus {full.state.facts['consensus']:.2f}",
        excess <= 0.05 and lost > 0.5,
        {"excess": excess, "excess_rounds": excess_rounds, "lost": lost},
    )
