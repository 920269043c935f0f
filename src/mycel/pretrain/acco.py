"""ACCO: gradients travel while the next ones are computed, and half of each round's batch makes up for the delay.

Nabli et al. 2024, "ACCO: Accumulate While You Communicate" (catalogue number 4). Two stages make a round; islands keep
the weights w^t and an estimate u^t of what they will be:

    stage A:   compute g  at w^t      while g~ travels;   u^{t+1} = AdamW(w^t, g~ / n~),  its memory thrown away
    stage B:   compute g~ at u^{t+1}  while g travels;    w^{t+1} = AdamW(w^t, (g + g~) / (n + n~)),  memory kept

g and g~ are sums over n and n~ target tokens. Each round's answers arrive one brief after the work was begun: the
machinery lets a node answer with what it has made and work on while that travels (``ahead``). How many batches an
island gathers in a stage is what fits into the time of its transfers (``accumulate = 0``), or a given number.

The first brief finds nothing made: it is answered by zeros of no tokens. Whether a real engine overlaps is its own
matter; values do not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from mycel.pretrain.synchronous import mean_gradient
from mycel.pretrain.weights import Pretraining, PretrainKnobs, advance, gradient_on, island_batches
from mycel.rounds.laboratory import Measured, Trail
from mycel.rounds.system import Answer, Knobs, Outcome, State
from mycel.wire.algebra import group, with_role
from mycel.wire.codecs import parse_codec
from mycel.wire.parcel import Parcel, Tensors

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.party import Party
    from mycel.rounds.world import World


class AccoKnobs(PretrainKnobs):
    """Settings of ACCO."""

    accumulate: int = Field(0, ge=0, description="batches an island gathers in a stage; 0: what fits its transfers")
    most: int = Field(64, ge=1, description="most batches in a stage")


class Acco(Pretraining):
    """Overlap of computation and communication, with a look-ahead half-step."""

    Knobs: ClassVar[type[Knobs]] = AccoKnobs
    reports = ("samples", "loss", "tokens")
    counts = ("samples", "tokens")
    paces = ("synchronous",)
    ahead = True

    def begin(self, world: World) -> State:
        """Note how many batches each island gathers."""
        state = super().begin(world)
        made = self.knobs.accumulate
        steps = [made or self._fitting(world, state, node) for node in range(len(world.nodes))]
        return state.but(base={}, facts={"updates": 0, "steps": steps})

    def _fitting(self, world: World, state: State, node: int) -> int:
        wire, link = world.recipe.wire, world.device(node).link
        down, up = (
            len(Parcel("work", {}, with_role("shared", state.shared)).to_bytes(parse_codec(codec)))
            for codec in (wire.brief_codec, wire.codec)
        )
        travel = link.down_seconds(down) + link.up_seconds(up)
        return int(min(self.knobs.most, max(1, travel // world.compute_seconds(node, 1, 0))))

    def brief(self, state: State, node: int) -> Parcel:
        """Tell the weights to compute at: the estimate in stage B, the real ones in stage A."""
        at = group(state.server, "estimate") or state.shared
        steps = state.facts["steps"]
        header = {"steps": steps[max(node, 0) % len(steps)]}
        return Parcel("work", header, with_role("shared", at))

    def work(self, brief: Parcel, party: Party) -> Parcel:
        """Answer with the gradient made before, and make the next one at these weights."""
        trainable = self.adopt(brief, party)
        before = group(party.personal, "gradient") or {
            name: torch.zeros_like(tensor) for name, tensor in group(brief.tensors, "shared").items()
        }
        tokens = int(party.personal.get("tokens", torch.zeros((), dtype=torch.int64)))
        loss = float(party.personal.get("loss", torch.zeros(())))
        done = int(party.personal.get("steps", torch.zeros((), dtype=torch.int64)))
        steps = int(brief.header["steps"])
        gradient, count, fresh_loss = gradient_on(party, trainable, island_batches(party, done, steps))
        party.personal.clear()
        party.personal.update(with_role("gradient", gradient))
        party.personal["tokens"] = torch.tensor(count)
        party.personal["loss"] = torch.tensor(fresh_loss)
        party.personal["steps"] = torch.tensor(done + steps)
        answer = party.answer(loss, before)
        return Parcel(answer.kind, {**answer.header, "tokens": tokens}, answer.tensors)

    @property
    def horizon(self) -> int:
        """Real steps over which the rate falls: one in two rounds."""
        return int(self.knobs.horizon or self.recipe.rounds.count // 2)

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        """Sum gradients and tokens; the first stage has none."""
        tokens = sum(int(answer.parcel.header["tokens"]) for answer in answers)
        return Outcome(shared=mean_gradient(answers), facts={"tokens": tokens})

    def step(self, state: State, outcome: Outcome) -> State:
        """A stage without gradients moves nothing; one makes an estimate, the next the real step over both halves."""
        facts, updates, tokens = state.facts, state.facts["updates"], outcome.facts["tokens"]
        memory, rate = group(state.server, "memory"), self.rate(updates)
        kept = with_role("memory", memory)
        if not tokens:
            return state
        first = group(state.server, "half")
        if not first:
            estimate, _ = advance(state.shared, outcome.shared, memory, self.recipe.training, rate)
            half = with_role("half", outcome.shared) | with_role("estimate", estimate)
            return state.but(server=kept | half, facts={**facts, "half": tokens})
        gradient = joined(first, state.facts["half"], outcome.shared, tokens)
        shared, memory = advance(state.shared, gradient, memory, self.recipe.training, rate)
        return state.but(shared=shared, server=with_role("memory", memory), facts={**facts, "updates": updates + 1})


def joined(first: Tensors, first_tokens: int, second: Tensors, second_tokens: int) -> Tensors:
    """Mean gradient over the tokens of two half-batches."""
    share = first_tokens / (first_tokens + second_tokens)
    return {name: tensor * share + second[name] * (1 - share) for name, tensor in first.items()}


def claim(lab: Laboratory) -> Measured:
    """A stage takes as long as the longer of computing and sending, a synchronous step their sum."""
    from mycel.pretrain.proving import pretraining

    gathered = {"rounds.count": 20, "fleet.devices": "equal", "knobs": {"accumulate": 0}}
    recipe = lab.recipe("acco", pretraining(gathered))
    own = lab.run(recipe, watch=(trail := Trail()))
    steps = own.state.facts["steps"][0]
    plain = lab.recipe(
        "synchronous", pretraining({"rounds.count": 4, "rounds.local_steps": steps, "fleet.devices": "equal"})
    )
    other = lab.run(plain, watch=(waiting := Trail()))
    compute = own.world.compute_seconds(0, steps, 0)
    link, size = own.world.device(0).link, own.meter.total("down", node=0) // own.progress.version
    travel = link.down_seconds(size) + link.up_seconds(size)
    stage = (trail.moments[-2] - trail.moments[2]) / (len(trail.moments) - 4)
    step = (waiting.moments[-2] - waiting.moments[0]) / (len(waiting.moments) - 2)
    ratio, plain_ratio = stage / max(compute, travel), step / max(compute, travel)
    return Measured(
        f"computing takes {compute:.3f} s, sending {travel:.3f} s; a stage takes {ratio:.2f} of the longer, "
        f"a synchronous step {plain_ratio:.2f}; {other.progress.version} steps compared",
        ratio <= 1.1 and plain_ratio > 1.5,
        {"ratio": ratio, "ratio_synchronous": plain_ratio},
    )
