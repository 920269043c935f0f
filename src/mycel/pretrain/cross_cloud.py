"""Cross-cloud training: clouds of unlike speed and price work as long as each other and count for what they are worth.

Yang et al. 2024, "Research on Key Technologies for Cross-Cloud Federated Training of Large Language Models" (catalogue
number 68). Local steps follow speed, so that nobody waits (``decisions.clouds``, which also chooses where and how often
to meet, by money). Changes combine by

    fedavg      w_c ~ n_c
    dynamic     w_c ~ n_c exp(-(l_c - min l) / tau),   l_c: loss of the cloud's model on a probe of the coordinator's,
                smoothed by halves; tau: deviation of the l_c, at least ``floor``
    gradient    changes per step, n_c weighted, as far as the clouds' mean number of steps

n_c counts the steps that a cloud took. The outer step is DiLoCo's with ``outer_momentum = 0`` and ``outer_rate = 1``
unless set. Not verified: the paper describes its parts in words; the formulas are our reading.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from math import exp
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from mycel.data.parties import load_parties
from mycel.data.tokens import TokenStore
from mycel.decisions.clouds import shared_steps
from mycel.pretrain.diloco import DiLoCo, DiLoCoKnobs
from mycel.rounds.laboratory import Measured
from mycel.rounds.system import Answer, Knobs, Outcome, State
from mycel.rounds.training import batch_loss
from mycel.wire.algebra import scale, seed_of, weighted_mean, with_role
from mycel.wire.parcel import Parcel

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.party import Party
    from mycel.rounds.world import World

PROBE_ROWS = 16


class CrossCloudKnobs(DiLoCoKnobs):
    """Settings of cross-cloud training."""

    outer_rate: float = Field(1.0, gt=0, description="step along the clouds' mean change")
    outer_momentum: float = Field(0.0, ge=0, lt=1, description="mu of Nesterov's momentum")
    aggregation: Literal["fedavg", "dynamic", "gradient"] = Field("dynamic", description="how changes combine")
    partition: Literal["dynamic", "static"] = Field("dynamic", description="local steps by speed, or the same for all")
    probe: str = Field(
        "", description="source of the coordinator's rows that uploads are scored on; empty: data.source"
    )
    floor: float = Field(0.05, gt=0, description="least tau, nats: below it differences of loss are noise")


class CrossCloud(DiLoCo):
    """Clouds in proportion to speed, price and worth."""

    Knobs: ClassVar[type[Knobs]] = CrossCloudKnobs
    reports = ("samples", "loss", "steps", "probe")
    counts = ("samples", "steps")
    paces = ("synchronous",)

    def begin(self, world: World) -> State:
        """Share the steps out by speed, and make the probe."""
        nodes, mean = range(len(world.nodes)), self.recipe.rounds.local_steps
        steps = [mean] * len(world.nodes)
        if self.knobs.partition == "dynamic":
            steps = shared_steps([1 / world.compute_seconds(node, 1, 0) for node in nodes], mean)
        return (
            super()
            .begin(world)
            .but(facts={"steps": steps, "quality": {}}, server=with_role("probe", self._probe(world)))
        )

    def _probe(self, world: World) -> dict[str, torch.Tensor]:
        changes = {
            "source": self.knobs.probe or self.recipe.data.source,
            "parties": "pooled",
            "examples": 8 * PROBE_ROWS,
            "held_out": 8 * PROBE_ROWS,
        }
        data = self.recipe.data.model_validate(self.recipe.data.model_dump() | changes)
        found = load_parties(data, seed_of(self.recipe.seed, "probe"))
        table = TokenStore.build(found, world.base.tokenizer, data.max_length, data.pack).train(0)
        rows = range(min(PROBE_ROWS, len(table)))
        batch = table.batch(rows, int(world.base.tokenizer.pad_token_id or 0))
        return {"ids": batch.input_ids, "mask": batch.attention_mask, "labels": batch.labels}

    def brief(self, state: State, node: int) -> Parcel:
        """Tell the weights, how long to work, and the probe."""
        steps = state.facts["steps"]
        brief = super().brief(state, node)
        probe = {name: tensor for name, tensor in state.server.items() if name.startswith("probe/")}
        return Parcel(brief.kind, {"steps": steps[max(node, 0) % len(steps)]}, {**brief.tensors, **probe})

    def work(self, brief: Parcel, party: Party) -> Parcel:
        """Train alone; send the change, the steps it took, and its loss on the probe."""
        from mycel.data.tokens import Batch

        answer = super().work(brief, party)
        batch = Batch(*(brief.tensors[f"probe/{name}"] for name in ("ids", "mask", "labels")))
        with party.trainable().active(), torch.no_grad():
            loss = float(batch_loss(party.base.model, batch))
        header = {**answer.header, "steps": self.steps_of(brief), "probe": loss}
        return Parcel(answer.kind, header, answer.tensors)

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        """Weigh the changes by what their makers are worth."""
        ordered = sorted(answers, key=lambda answer: answer.node)
        headers = [answer.parcel.header for answer in ordered]
        steps = [max(1, int(header["steps"])) for header in headers]
        quality = dict(state.facts["quality"])
        for answer, header in zip(ordered, headers, strict=True):
            key = str(answer.node)
            quality[key] = (quality.get(key, header["probe"]) + header["probe"]) / 2
        weights = [float(count) for count in steps]
        changes = [answer.tensors() for answer in ordered]
        if self.knobs.aggregation == "dynamic":
            losses = [quality[str(answer.node)] for answer in ordered]
            weights = [count * worth for count, worth in zip(weights, worths(losses, self.knobs.floor), strict=True)]
        elif self.knobs.aggregation == "gradient":
            mean = sum(steps) / len(steps)
            changes = [scale(change, mean / count) for change, count in zip(changes, steps, strict=True)]
        shares = {str(a.node): weight / sum(weights) for a, weight in zip(ordered, weights, strict=True)}
        return Outcome(shared=weighted_mean(changes, weights), facts={"quality": quality, "shares": shares})

    def step(self, state: State, outcome: Outcome) -> State:
        """DiLoCo's outer step; what was learnt of the clouds is kept."""
        probe = {name: tensor for name, tensor in state.server.items() if name.startswith("probe/")}
        velocity = {name: tensor for name, tensor in state.server.items() if name not in probe}
        after = super().step(state.but(server=velocity), outcome)
        return after.but(server={**after.server, **probe}, facts={**state.facts, **outcome.facts})


def worths(losses: Sequence[float], floor: float) -> list[float]:
    """Factor of each cloud's weight: 1 for the least loss, falling by e for every deviation above it."""
    spread = max(floor, statistics.pstdev(losses))
    return [exp(-(loss - min(losses)) / spread) for loss in losses]


def claim(lab: Laboratory) -> Measured:
    """Steps by speed leave little idle; a cloud of nonsense loses its weight; egress prices decide where to meet."""
    from mycel.pretrain.clouds_proving import idle_share, money, with_nonsense

    idle, static = (idle_share(lab, kind) for kind in ("dynamic", "static"))
    dynamic, plain = with_nonsense(lab, "dynamic"), with_nonsense(lab, "fedavg")
    cheap, naive = money()
    return Measured(
        f"three clouds of speeds 1, 2 and 4 are idle {idle:.0%} of the time, {static:.0%} with equal steps; a cloud of "
        f"shuffled words ends with {dynamic.share:.0%} of the weight ({plain.share:.0%} by samples) and the loss on "
        f"the others' text is {dynamic.loss:.3f} against {plain.loss:.3f}; meeting where and as often as prices say "
        f"costs {cheap:,.0f} against {naive:,.0f} at the fastest cloud every 8 steps",
        idle < 0.10
        and static > 0.40
        and dynamic.share < 0.5 * plain.share
        and dynamic.loss < plain.loss
        and cheap < naive,
        {
            "idle": idle,
            "idle_static": static,
            "share": dynamic.share,
            "loss": dynamic.loss,
            "loss_fedavg": plain.loss,
            "money": cheap,
            "money_naive": naive,
        },
    )
