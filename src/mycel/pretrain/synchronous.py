"""Synchronous data parallelism: every step, every island's gradient; the yardstick of all that sends less often.

    island k:      g_k = sum over its batch's target tokens of dL/dw at w_t;  n_k tokens
    coordinator:   w_{t+1} = AdamW(w_t, sum_k g_k / sum_k n_k)

A round is one step (``rounds.local_steps`` batches are summed into one gradient), and the optimiser's memory lies at
the coordinator: the result is that of one machine which sees all islands' batches together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mycel.pretrain.weights import Pretraining, advance, gradient_on, island_batches
from mycel.rounds.laboratory import Measured
from mycel.rounds.system import Answer, Outcome, State
from mycel.wire.algebra import group, norm, subtract
from mycel.wire.parcel import Parcel, Tensors

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.party import Party


class Synchronous(Pretraining):
    """Data-parallel training with one gradient exchange per step."""

    reports = ("samples", "loss", "tokens")
    counts = ("samples", "tokens")
    paces = ("synchronous",)

    @property
    def horizon(self) -> int:
        """Steps over which the learning rate falls: one a round."""
        return int(self.knobs.horizon or self.recipe.rounds.count)

    def work(self, brief: Parcel, party: Party) -> Parcel:
        """Send the gradient summed over this step's target tokens, and their number."""
        trainable = self.adopt(brief, party)
        steps = self.recipe.rounds.local_steps
        gradient, tokens, loss = gradient_on(party, trainable, island_batches(party, party.version * steps, steps))
        answer = party.answer(loss, gradient)
        return Parcel(answer.kind, {**answer.header, "tokens": tokens}, answer.tensors)

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        """Mean gradient over all target tokens."""
        return Outcome(shared=mean_gradient(answers))

    def step(self, state: State, outcome: Outcome) -> State:
        """One step of the recipe's optimiser, whose memory is the coordinator's."""
        done = int(state.facts.get("steps", 0))
        memory = group(state.server, "memory")
        shared, memory = advance(state.shared, outcome.shared, memory, self.recipe.training, self.rate(done))
        kept = {f"memory/{name}": tensor for name, tensor in memory.items()}
        return state.but(shared=shared, server=kept, facts={"steps": done + 1})


def mean_gradient(answers: Sequence[Answer]) -> Tensors:
    """Sum of the answers' gradients over the sum of their token counts, whatever their order."""
    tokens = sum(int(answer.parcel.header.get("tokens", 0)) for answer in answers)
    total: Tensors = {}
    for answer in sorted(answers, key=lambda each: each.node):
        for name, gradient in answer.tensors().items():
            total[name] = total[name] + gradient if name in total else gradient
    return {name: tensor / max(tokens, 1) for name, tensor in total.items()}


def claim(lab: Laboratory) -> Measured:
    """Four islands' steps end where one machine with all their batches does."""
    from mycel.pretrain.proving import pretraining

    recipe = lab.recipe("synchronous", pretraining({"rounds.count": 6}))
    many = lab.run(recipe)
    world, single = many.world, State()
    single = many.system.begin(world)
    for version in range(recipe.rounds.count):
        total: Tensors = {}
        tokens = 0
        for node in range(len(world.nodes)):
            party = world.site.party(node, version)
            trainable = many.system.adopt(many.system.brief(single, node), party)
            gradient, count, _ = gradient_on(party, trainable, island_batches(party, version, 1))
            total = {name: total.get(name, torch.zeros(())) + tensor for name, tensor in gradient.items()}
            tokens += count
        mean = {name: tensor / tokens for name, tensor in total.items()}
        single = many.system.step(single, Outcome(shared=mean))
    distance = norm(subtract(single.shared, many.state.shared)) / norm(single.shared)
    return Measured(
        f"after 6 steps the weights lie {distance:.1e} (relative) from those of one machine with all batches",
        distance < 1e-6,
        {"distance": distance},
    )
