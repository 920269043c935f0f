"""The coordinator's half of the guards that a recipe names: open, distrust, add noise, count what was spent."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mycel.guard.accounting import Releases, epsilon
from mycel.guard.attacks.threats import liars, parse_threat
from mycel.guard.clip import clip
from mycel.guard.contract import Guard, Opened, Post, Sealed
from mycel.guard.hiding import coordinator_half
from mycel.guard.noise import flat_norm, next_bound, noise_source, perturb, split_noise
from mycel.rounds.distrust import Distrust
from mycel.rounds.sealing import noise_of
from mycel.rounds.system import Answer, State, System
from mycel.rounds.world import World
from mycel.wire.algebra import add, group, scale, seed_of, with_role
from mycel.wire.codecs import parse_codec
from mycel.wire.codecs.fixed import Fixed
from mycel.wire.parcel import Parcel, Tensors

COUNT_SHARE = 20  # the count behind adaptive clipping has noise of a twentieth of the cohort (Andrew et al. 2021)


@dataclass
class Guarding:
    """Guards of one arm.

    Attributes
    ----------
    facts : dict
        What must be remembered from round to round, JSON: the clipping bound, releases, asks, clipped updates.
    current : Guard or None
        The hiding guard's attempt at the round at hand.
    """

    world: World
    system: System
    facts: dict[str, Any] = field(default_factory=lambda: {"asked": {}, "released": 0, "within": 0, "seen": 0})
    current: Guard | None = None

    def __post_init__(self) -> None:
        self.guard = self.world.recipe.guard
        self.hides = self.guard.sums != "plain"
        self.distrust = Distrust(self.world, self.system) if self.guard.filter else None

    @property
    def bound(self) -> float:
        """Bound on an update's norm in this round."""
        return float(self.facts.get("bound", self.guard.clip_norm))

    @property
    def odds(self) -> float:
        """Chance of a party to be drawn for a round."""
        return self.world.recipe.rounds.cohort if self.guard.private == "user" else 1.0

    def cohort(self, version: int) -> tuple[int, ...] | None:
        """Draw parties independently, as the accountant takes them to be; None where the recipe's own way will do."""
        if self.guard.private != "user" or self.odds >= 1:
            return None
        key = f"{version}"
        if self.facts.get("drawn", [""])[0] != key:
            seed = self.world.seed("drawn", version) if self.guard.replayable else random.SystemRandom().getrandbits(63)
            chance = random.Random(seed)
            nodes = [node for node in range(len(self.world.nodes)) if chance.random() < self.odds]
            self.facts["drawn"] = [key, nodes]
        return tuple(self.facts["drawn"][1])

    async def prepare(self, post: Post, cohort: Sequence[int], state: State) -> list[int]:
        """Exchange the hiding guard's messages; return the nodes that can take part."""
        self.release()
        even = self.guard.private == "user"
        weights = {node: 1 if even else self.world.nodes[node].samples for node in cohort}
        codec = parse_codec(self.world.recipe.wire.codec)
        self.current = coordinator_half(self.guard.sums, codec, self._shapes(state), weights, self.guard.staying)
        assert self.current is not None
        return await self.current.prepare(post, cohort)

    def release(self) -> None:
        """Let go of the attempt at hand, if there is one."""
        if self.current is not None:
            self.current.close()
        self.current = None

    def terms(self) -> dict[str, Any]:
        """What every brief tells of the guard."""
        told = dict(self.current.terms()) if self.current is not None else {}
        return told | ({"clip": self.bound} if self.guard.within else {})

    def count(self, node: int) -> None:
        """Take note that a node was asked to work: what it releases counts as spent, whether or not it arrives."""
        asked = self.facts["asked"]
        asked[str(node)] = asked.get(str(node), 0) + 1

    async def open(self, post: Post, answers: Sequence[Answer], state: State) -> list[Answer]:
        """Return what the system is to combine in place of what arrived.

        Raises
        ------
        ParcelError
            When a hidden sum cannot be opened: the round is to be repeated.
        """
        if self.guard.private == "user":
            return [self._noisy(await self._sum(post, answers), state)]
        if self.current is not None:
            opened = await self._sum(post, answers)
            return [_stand_in(scale(opened.total, 1 / opened.weight), opened.weight)]
        threat = self.world.recipe.threat
        answers = self._conspired(answers) if threat.attack else list(answers)
        return self.distrust.judge(answers, state) if self.distrust is not None else answers

    async def _sum(self, post: Post, answers: Sequence[Answer]) -> Opened:
        if self.current is not None:
            sealed = (Sealed(answer.node, answer.parcel, answer.samples) for answer in answers)
            opened = await self.current.open(post, sealed)
        else:
            total: Tensors = {}
            within = 0
            for answer in answers:
                update = answer.tensors()
                within += flat_norm(update) <= self.bound
                total = add(total, clip(update, self.bound)) if total else clip(update, self.bound)
            opened = Opened(total, len(answers), within)
        self.facts["within"] += opened.within
        self.facts["seen"] += len(answers)
        return opened

    def _noisy(self, opened: Opened, state: State) -> Answer:
        """The mean of bounded updates over the expected cohort, with noise of which one party's share is covered."""
        recipe, version = self.world.recipe, self.facts["released"]
        seed = seed_of(recipe.seed, "user noise", version) if self.guard.replayable else None
        source = noise_source(seed)
        expected = self.odds * len(self.world.nodes)
        multiplier = noise_of(recipe, self.odds)
        bound = self.bound
        if self.guard.within:
            deviation = max(expected / COUNT_SHARE, multiplier)  # of a small cohort the count would cost too much
            multiplier = split_noise(multiplier, deviation)
            counted = opened.within + deviation * float(torch.randn((), generator=source))
            share = min(max(counted / expected, 0.0), 1.0)
            self.facts["bound"] = next_bound(bound, share, self.guard.within)
        total = opened.total or {name: torch.zeros(shape) for name, shape in self._shapes(state).items()}
        codec = parse_codec(recipe.wire.codec)
        # Rounding each of d elements can lengthen a bounded update.
        size = sum(value.numel() for value in total.values())
        slack = codec.step / 2 * size**0.5 if self.current is not None and isinstance(codec, Fixed) else 0.0
        noisy = perturb(total, multiplier * (bound + slack), source)
        self.facts["released"] += 1
        return _stand_in(scale(noisy, 1 / expected), 1)

    def _conspired(self, answers: Sequence[Answer]) -> list[Answer]:
        threat = parse_threat(self.world.recipe.threat.attack)
        if not threat.knows_others:
            return list(answers)
        lying = liars(len(self.world.nodes), self.world.recipe.threat.share)
        honest = [answer.tensors() for answer in answers if answer.node not in lying]
        if not honest:
            return list(answers)
        lie = with_role("update", threat.conspire(honest))
        return [
            replace(answer, sent=Parcel("answer", answer.parcel.header, answer.parcel.tensors | lie))
            if answer.node in lying
            else answer
            for answer in answers
        ]

    def _shapes(self, state: State) -> dict[str, tuple[int, ...]]:
        return self.system.expects(self.system.brief(state, 0)) or {}

    def receipt(self) -> dict[str, Any]:
        """What the guards did: how sums were made, who was distrusted, and how much privacy was spent for whom."""
        guard, recipe = self.guard, self.world.recipe
        receipt: dict[str, Any] = {"sums": guard.sums, "filter": guard.filter, "private": guard.private}
        if self.facts["seen"]:
            receipt["clipping_rate"] = 1 - self.facts["within"] / self.facts["seen"]
        if not guard.private:
            return receipt
        spent = {name: epsilon([releases], guard.delta) for name, releases in self._spent().items()}
        for_whom = {"user": "any party, all its examples", "local": "any party, without trust in the coordinator"}
        return receipt | {
            "for": for_whom.get(guard.private, "any single training example of a party"),
            "epsilon": max(spent.values(), default=0.0),
            "delta": guard.delta,
            "rounds": self.facts["released"] if guard.private == "user" else recipe.rounds.count,
            "epsilon_per_party": spent if guard.private != "user" else {},
            "clip_norm": self.bound,
            "noise_is_secret": not guard.replayable,
            "not_covered": ["scores on held-out examples"],
        }

    def _spent(self) -> dict[str, Releases]:
        recipe, private = self.world.recipe, self.guard.private
        if private == "user":
            return {"everyone": Releases(noise_of(recipe, self.odds), self.odds, self.facts["released"])}
        spent = {}
        for node in self.world.nodes:
            asked = self.facts["asked"].get(str(node.index), 0)
            steps = recipe.rounds.local_steps if private == "example" else 1
            odds = min(1.0, recipe.training.batch_size / node.samples) if private == "example" else 1.0
            spent[node.name] = Releases(noise_of(recipe, odds, steps), odds, asked * steps)
        return spent


def _stand_in(update: Tensors, weight: int) -> Answer:
    """One answer in place of all."""
    return Answer(-1, Parcel("answer", {"samples": weight}, with_role("update", update)), weight, 0, float(weight))


def restored(guarding: Guarding, facts: Mapping[str, Any], tensors: Tensors) -> None:
    """Put back what a checkpoint kept."""
    guarding.facts = dict(facts) or guarding.facts
    if guarding.distrust is not None:
        guarding.distrust.histories = {
            int(node): group(tensors, node) for node in sorted({name.split("/")[0] for name in tensors})
        }
