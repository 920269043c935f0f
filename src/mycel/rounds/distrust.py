"""Robust filters applied to the answers of a round, in the space of what LoRA updates change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mycel.data.parties import load_parties
from mycel.data.tokens import TokenTable
from mycel.guard.filters import Evidence, parse_filter
from mycel.rounds.factors import factors_a, factors_b
from mycel.rounds.system import Answer, State, System
from mycel.rounds.world import World
from mycel.wire.algebra import add, group, scale, seed_of, subtract, with_role
from mycel.wire.parcel import Parcel, Tensors


@dataclass
class Distrust:
    """A filter over the answers of one arm; ``histories`` are the sums of each party's effects so far."""

    world: World
    system: System
    histories: dict[int, Tensors] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.filter = parse_filter(self.world.recipe.guard.filter)
        self.root: TokenTable | None = self._root() if self.filter.trusts else None

    def judge(self, answers: Sequence[Answer], state: State) -> list[Answer]:
        """Return what is left of the answers: one in place of all where a sum is needed, else those that count."""
        if len(answers) < self.filter.least():
            return list(answers)
        effects = [self._effect(answer.tensors(), state) for answer in answers]
        evidence = self._evidence(answers, effects, state)
        verdict = self.filter.judge(evidence)
        shares = verdict.shares
        total = float(evidence.weights.sum())
        if self.system.needs != "sum":
            pairs = zip(answers, shares.tolist(), strict=True)
            return [replace(answer, weight=share * total) for answer, share in pairs if share > 0]
        update: Tensors = {}
        if verdict.centre is not None and effects[0].keys() == answers[0].tensors().keys():
            update = _unrow(verdict.centre, effects[0])
        else:
            if verdict.centre is not None:
                shares = nearest_mixture(evidence.rows, verdict.centre)
            for answer, share in zip(answers, shares.tolist(), strict=True):
                part = scale(answer.tensors(), share)
                update = add(update, part) if update else part
        samples = sum(answer.samples for answer in answers)
        parcel = Parcel("answer", {"samples": samples}, with_role("update", update))
        return [Answer(-1, parcel, samples, 0, total)]

    def _evidence(self, answers: Sequence[Answer], effects: Sequence[Tensors], state: State) -> Evidence:
        if self.filter.remembers:
            for answer, effect in zip(answers, effects, strict=True):
                before = self.histories.get(answer.node)
                self.histories[answer.node] = add(before, effect) if before else effect
        reference = self._effect(self._own(state), state) if self.root is not None else None
        kept = [_row(self.histories[answer.node]) for answer in answers] if self.filter.remembers else []
        return Evidence(
            torch.stack([_row(effect) for effect in effects]),
            torch.tensor([answer.weight for answer in answers]),
            _row(reference) if reference is not None else None,
            torch.stack(kept) if kept else None,
        )

    def _effect(self, update: Tensors, state: State) -> Tensors:
        """What an update changes in the weights a model computes with; of anything but both LoRA factors, itself."""
        if not factors_a(update) or not factors_b(update):
            return update
        trainable = self.world.trainable()
        start = {name: state.shared[name] for name in update if name in state.shared}
        if not start:
            return trainable.delta_weight(update)
        if any(start[name].shape != update[name].shape for name in update):
            return update
        return subtract(trainable.delta_weight(add(start, update)), trainable.delta_weight(start))

    def _own(self, state: State) -> Tensors:
        """Train on the coordinator's own examples, as a party would."""
        assert self.root is not None
        party = self.world.observer()
        party.examples = self.root
        brief = self.system.brief(state, -1)
        return group(self.system.work(brief, party).tensors, "update")

    def _root(self) -> TokenTable:
        recipe = self.world.recipe
        changes = {"source": recipe.guard.root, "parties": "pooled"}
        data = recipe.data.model_validate(recipe.data.model_dump() | changes)
        (found,) = load_parties(data, seed_of(recipe.seed, "root"))
        return TokenTable.from_examples(found.train, self.world.base.tokenizer, recipe.data.max_length)


def nearest_mixture(rows: Tensor, centre: Tensor) -> Tensor:
    """Shares of 0 or more by which the rows add up to what comes nearest to ``centre``, by least squares.

    A centre of effects is no effect of any factors; this is the way back that keeps to what parties sent.
    """
    matrix = rows.double()
    inner = matrix @ matrix.T
    ridge = 1e-9 * inner.diagonal().mean().clamp_min(1e-30) * torch.eye(len(inner), dtype=torch.float64)
    shares: Tensor = torch.linalg.solve(inner + ridge, matrix @ centre.double())
    return shares.clamp_min(0.0)


def _row(tensors: Tensors) -> Tensor:
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


def _unrow(row: Tensor, like: Tensors) -> Tensors:
    parts = torch.split(row, [like[name].numel() for name in sorted(like)])
    return {name: part.reshape(like[name].shape) for name, part in zip(sorted(like), parts, strict=True)}
