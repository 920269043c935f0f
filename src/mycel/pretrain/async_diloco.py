"""Asynchronous DiLoCo: no island waits; delayed Nesterov and local steps in proportion to speed keep it as good.

Liu et al. 2024, "Asynchronous Local-SGD Training for Language Modeling" (catalogue number 51).

    island k:      H_k = floor(H v_k / max v)  steps from the newest w (dynamic local updates; v: steps a second)
    coordinator, when d_k arrives (g = -d_k, s versions late, shortened by (1 + s)^-exponent):
      D <- D + g
      t+1 not a multiple of N:   w <- w - rate (c mu b + g / N)
      every N-th arrival:        b <- mu b + D / N;   w <- w - rate ((1 - c N + c) mu b + g / N);   D <- 0

The exponent is ``rounds.staleness`` (0 in the paper's rule). With one island, ``N = 1`` and ``c = 0`` the rule is the
outer Nesterov of DiLoCo with momentum folded in once: ``w - rate (mu b + g)`` after ``b <- mu b + g``. ``delay = 1``
with several islands is the naive asynchronous Nesterov that the paper sets out to mend.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from mycel.pretrain.diloco import DiLoCo, DiLoCoKnobs
from mycel.rounds.laboratory import Measured, Trail
from mycel.rounds.system import Answer, Knobs, Outcome, State
from mycel.wire.algebra import add, discount, group, scale, with_role
from mycel.wire.parcel import Parcel, Tensors

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.party import Party
    from mycel.rounds.world import World


class AsyncDiLoCoKnobs(DiLoCoKnobs):
    """Settings of asynchronous DiLoCo."""

    delay: int = Field(0, ge=0, description="N, arrivals between two changes of the momentum; 0: as many as islands")
    activation: float = Field(0.0, ge=0, le=1, description="c, share of the momentum that acts between its changes")
    dynamic: bool = Field(True, description="local steps in proportion to an island's speed")


class AsyncDiLoCo(DiLoCo):
    """Delayed Nesterov over whoever arrives."""

    Knobs: ClassVar[type[Knobs]] = AsyncDiLoCoKnobs
    paces = ("buffered",)

    def begin(self, world: World) -> State:
        """Note how long each island works alone: the fastest ``rounds.local_steps``, the others in proportion."""
        nodes = range(len(world.nodes))
        longest = self.recipe.rounds.local_steps
        steps = [longest] * len(world.nodes)
        if self.knobs.dynamic:
            speeds = [1 / world.compute_seconds(node, 1, 0) for node in nodes]
            steps = [max(1, floor(longest * speed / max(speeds))) for speed in speeds]
        return super().begin(world).but(facts={"steps": steps, "arrivals": 0})

    def brief(self, state: State, node: int) -> Parcel:
        """Tell the island every weight, and how long to work."""
        brief = super().brief(state, node)
        steps = state.facts["steps"]
        return Parcel(brief.kind, {"steps": steps[max(node, 0) % len(steps)]}, brief.tensors)

    @property
    def horizon(self) -> int:
        """Steps over which the rate falls, from the first version to the last."""
        return int(self.knobs.horizon or self.recipe.rounds.count * self.recipe.rounds.local_steps)

    def begun(self, party: Party, done: int) -> int:
        """Rates fall with the versions: by its own count of steps, a slow island would end at a high rate."""
        return party.version * self.horizon // self.recipe.rounds.count

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        """Sum the arrivals' changes, each shortened by its staleness."""
        total: Tensors = {}
        for answer in sorted(answers, key=lambda each: each.node):
            share = discount(answer.staleness, self.recipe.rounds.staleness)
            change = scale(answer.tensors(), share)
            total = add(total, change) if total else change
        return Outcome(shared=total, facts={"arrivals": len(answers)})

    def step(self, state: State, outcome: Outcome) -> State:
        """Move at once; let the momentum change only when ``delay`` arrivals have been gathered."""
        delay = self.knobs.delay or len(state.facts["steps"])
        arrivals = state.facts["arrivals"] + outcome.facts["arrivals"]
        due = arrivals // delay > state.facts["arrivals"] // delay
        momentum, buffer = group(state.server, "momentum"), group(state.server, "buffer")
        shared, momentum, buffer = delayed_nesterov(
            state.shared,
            momentum,
            buffer,
            outcome.shared,
            due,
            delay,
            (self.knobs.outer_rate, self.knobs.outer_momentum, self.knobs.activation),
        )
        server = with_role("momentum", momentum) | with_role("buffer", buffer)
        return state.but(shared=shared, server=server, facts={**state.facts, "arrivals": arrivals})


def delayed_nesterov(
    weights: Tensors,
    momentum: Tensors,
    buffer: Tensors,
    change: Tensors,
    due: bool,
    delay: int,
    settings: tuple[float, float, float],
) -> tuple[Tensors, Tensors, Tensors]:
    """One arrival: weights, momentum and gathered changes afterwards; ``settings`` are rate, mu and c."""
    rate, mu, activation = settings
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    momentum, buffer = momentum or zeros, add(buffer, change) if buffer else change
    share = activation
    if due:
        momentum = add(scale(momentum, mu), buffer, 1 / delay)
        share, buffer = 1 - activation * delay + activation, zeros
    moved = add(add(weights, change, rate / delay), momentum, rate * share * mu)
    return moved, momentum, buffer


def claim(lab: Laboratory) -> Measured:
    """Over unequal islands the loss of synchronous DiLoCo is reached in half the virtual time or less."""
    from mycel.pretrain.proving import asynchronous, pretraining, reached

    waiting = lab.run(
        lab.recipe("diloco", pretraining({"rounds.count": 8, "rounds.local_steps": 64})), watch=(slow := Trail())
    )
    target = lab.mixture(waiting)
    running = lab.run(lab.recipe("async_diloco", pretraining(asynchronous(8, 64))), watch=(fast := Trail()))
    moment = reached(lab, running, fast, target)
    if moment is None:
        end = lab.mixture(running)
        return Measured(f"the loss {target:.3f} of synchronous DiLoCo was not reached: it ended at {end:.3f}", False)
    ratio = moment / slow.moments[-1]
    return Measured(
        f"loss {target:.3f} after {moment:.1f} s, synchronous DiLoCo took {slow.moments[-1]:.1f} s: "
        f"{ratio:.2f} of the time",
        ratio <= 0.5,
        {"ratio": ratio, "seconds": moment, "seconds_synchronous": slow.moments[-1]},
    )
