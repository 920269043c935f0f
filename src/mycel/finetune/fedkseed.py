"""FedKSeed: whole models are tuned by federations whose messages are a few thousand scalars.

Qin et al. 2024, "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18
Kilobytes" (ICML; catalogue number 8). A pool of K seeds is common knowledge, and so is w_0. Whatever any party has
ever done is a step along one of K directions, so the model is w_0 and one scalar per seed:

    model:        w = w_0 - eta * sum_j G_j z(s_j),   z ~ N(0, I)
    party, step:  g = [L(w + e z_j) - L(w - e z_j)] / 2e,   w <- w - eta g z_j,   j drawn from the pool
    coordinator:  G_j <- G_j + sum_k p_k sum_(steps of k that drew j) g,   p_k = n_k / sum n

Down travel the K scalars; up travels one scalar per step, since the coordinator can draw the same j. Both ends rebuild
w from w_0 in one fixed order, so they hold equal bits; a party's own walk, true to rounding only, is thrown away.
eta is ``training.learning_rate``, e ``training.perturbation``, and ``rounds.local_steps`` the steps (200 in the paper).
The paper counts 4 K + 8 steps + 4 bytes, 17,988 of them; drawn seeds save half of what goes up, which pays for headers.

With one party this is local descent on two-point estimates, up to rounding. Any trainable will do; over LoRA the
starting factors come from the recipe's seed. The paper's learning rates (3e-7 for billions of weights) do not carry
over to small models.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from mycel.errors import RecipeError
from mycel.finetune.fedavg import FedAvg, FedAvgKnobs
from mycel.rounds.gradients import two_point, walk
from mycel.rounds.laboratory import Measured
from mycel.rounds.replay import ONE_ROUND, draws, pool_of, replay, require_forward_passes, require_one_rank
from mycel.rounds.system import Answer, Outcome, State
from mycel.rounds.training import batch_loss
from mycel.wire.algebra import group, with_role
from mycel.wire.parcel import Parcel

if TYPE_CHECKING:
    from mycel.models.trainable import Trainable
    from mycel.recipe.schema import Recipe
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.party import Party
    from mycel.rounds.simulation import Finished
    from mycel.rounds.world import World

SCALARS = "scalars"
PLAIN = {
    "training.gradient": "zeroth-order",
    "training.optimizer": "sgd",
    "training.clip_norm": 0.0,
    "trainable.kind": "full",
}


class FedKSeedKnobs(FedAvgKnobs):
    """Settings of FedKSeed."""

    seeds: int = Field(4096, ge=1, le=1 << 16, description="directions K in the pool; 4 bytes each in every brief")


class FedKSeed(FedAvg):
    """One scalar per seed is the whole federation's state; a scalar per local step is a party's whole answer."""

    Knobs = FedKSeedKnobs
    reports = ("samples",)
    feedback = ONE_ROUND

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        require_forward_passes(recipe, plain=True)
        require_one_rank(recipe)

    @cached_property
    def pool(self) -> list[int]:
        """The seeds."""
        return pool_of(self.recipe, self.knobs.seeds)

    def begin(self, world: World) -> State:
        """All scalars are zero."""
        if world.start is not None:
            raise RecipeError(f"the system {self.recipe.system!r} starts from the base alone, not from a given state")
        return State(shared={SCALARS: torch.zeros(self.knobs.seeds)}, facts={"round": 0})

    def brief(self, state: State, node: int) -> Parcel:
        """Tell the node the scalars."""
        return Parcel("work", {}, with_role("shared", state.shared))

    def adopt(self, brief: Parcel, party: Party) -> Trainable:
        """Rebuild the weights from where training began."""
        trainable = party.trainable()
        trainable.load(party.initial(trainable))
        scalars = group(brief.tensors, "shared")[SCALARS]
        replay(trainable.parameters(), self.pool, scalars * -self.recipe.training.learning_rate)
        return trainable

    def expects(self, brief: Parcel) -> dict[str, tuple[int, ...]]:
        """One scalar per local step."""
        return {SCALARS: (self.recipe.rounds.local_steps,)}

    def work(self, brief: Parcel, party: Party) -> Parcel:
        """Walk along drawn directions, each step by its slope, and send the slopes."""
        trainable, training = self.adopt(brief, party), self.recipe.training
        drawn = draws(self.recipe, party.node, party.version, self.recipe.rounds.local_steps, self._told_odds(brief))
        parameters, slopes = trainable.parameters(), []
        with trainable.active():
            for index, batch in zip(drawn.tolist(), party.batches(), strict=True):
                seed = self.pool[index]
                slope, _ = two_point(
                    lambda batch=batch: batch_loss(party.base.model, batch),  # type: ignore[misc]
                    parameters,
                    seed,
                    training.perturbation,
                )
                walk(parameters, seed, -training.learning_rate * slope)
                slopes.append(slope)
        return Parcel("answer", {"samples": party.samples}, with_role("update", {SCALARS: torch.tensor(slopes)}))

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        """Credit every slope, weighted by samples, to the seed that was drawn for it."""
        total = sum(answer.weight for answer in answers)
        change = torch.zeros(self.knobs.seeds, dtype=torch.float64)
        for answer in sorted(answers, key=lambda answer: answer.node):
            slopes = answer.tensors()[SCALARS].double()
            change.index_add_(0, self.drawn(state, answer), slopes * (answer.weight / total))
        return Outcome(shared={SCALARS: change.float()})

    def step(self, state: State, outcome: Outcome) -> State:
        """Add up."""
        moved = super().step(state, outcome)
        return moved.but(facts={**moved.facts, "round": state.facts["round"] + 1})

    def drawn(self, state: State, answer: Answer) -> Tensor:
        """Return the indices that the answering party drew, which follow from the version it was told."""
        version = state.facts["round"] - answer.staleness
        return draws(self.recipe, answer.node, version, len(answer.tensors()[SCALARS]), self.odds(state))

    def odds(self, state: State) -> Tensor:
        """How likely each seed is to be drawn: all alike."""
        return torch.ones(self.knobs.seeds, dtype=torch.int64)

    def _told_odds(self, brief: Parcel) -> Tensor:
        return self.odds(State(server=group(brief.tensors, "server")))


def claim(lab: Laboratory) -> Measured:
    """Bytes per party and round, the same at two model sizes; the party's rebuilt model; what tuning gains."""
    tuned = lab.run(_recipe(lab, "micro", {}))
    larger = lab.run(_recipe(lab, "tiny", {"data.parties": "iid", "data.count": 1, "training.batch_size": 1}))
    traffic = [round_bytes(run) for run in (tuned, larger)]
    most, alike = max(map(max, traffic)), traffic[0][1] == traffic[1][1]
    equal, losses = rebuilt_alike(tuned), [tuned.loss(0), tuned.loss()]
    return Measured(
        f"at most {most:,} bytes per party and round, up and down together, headers counted and parties evaluated in "
        f"every second round; the other round costs {traffic[0][1]:,} and {traffic[1][1]:,} at two model sizes; models "
        f"rebuilt at party and coordinator {'agree' if equal else 'disagree'} to the bit; two rounds take the held-out "
        f"loss of a fully tuned model from {losses[0]:.4f} to {losses[1]:.4f}",
        most < 18_000 and alike and equal and losses[1] < losses[0],
        {"bytes": most, "loss_before": losses[0], "loss_after": losses[1]},
    )


def round_bytes(finished: Finished) -> list[int]:
    """Return the bytes per answering party of each round, up and down together, rounded up."""
    rounds = finished.progress.rounds
    return [-(-(entry["bytes_up"] + entry["bytes_down"]) // entry["answers"]) for entry in rounds]


def rebuilt_alike(finished: Finished) -> bool:
    """Whether the scores that parties gave the model they rebuilt equal those of the coordinator's rebuilding."""
    brief = finished.system.brief(finished.state, -1)
    site, party = finished.world.site, finished.world.observer(-1, finished.progress.version)
    return all(site.evaluate(brief, party, node) == scores for node, scores in finished.scores().items())


def _recipe(lab: Laboratory, base: str, changes: dict[str, Any]) -> Recipe:
    rounds = {"rounds.count": 2, "rounds.local_steps": 200, "rounds.evaluate_every": 2}
    steps = {"training.batch_size": 4, "training.learning_rate": 3e-4}
    return lab.recipe("fedkseed", {**PLAIN, "model.base": base, **rounds, **steps, **changes})
