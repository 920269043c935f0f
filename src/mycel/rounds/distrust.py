"""Robust filters applied to the answers of a round, in the space of what LoRA updates change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mycel.data.parties import load_parties
from mycel.data.tokens import TokenTable
from mycel.guard.filters import Evidence, parse_filter
from mycel.rounds.algebra import add, scale, seed_of, subtract
from mycel.rounds.factors import factors_a, factors_b, layers
from mycel.rounds.system import Answer, State, System, group, with_role
from mycel.rounds.world import World
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
        if self.filter.remembers:
            for answer, effect in zip(answers, effects, strict=True):
                before = self.histories.get(answer.node)
                self.histories[answer.node] = add(before, effect) if before else effect
        weights = torch.tensor([answer.weight for answer in answers])
        reference = self._effect(self._own(state), state) if self.root is not None else None
        kept = [_row(self.histories[answer.node]) for answer in answers] if self.filter.remembers else []
        evidence = Evidence(
            torch.stack([_row(effect) for effect in effects]),
            weights,
            _row(reference) if reference is not None else None,
            torch.stack(kept) if kept else None,
        )
        verdict = self.filter.judge(evidence)
        total = float(weights.sum())
        if self.system.needs != "sum":
            shares = zip(answers, verdict.shares.tolist(), strict=True)
            return [replace(answer, weight=share * total) for answer, share in shares if share > 0]
        if verdict.centre is not None:
            update = self._update(_unrow(verdict.centre, effects[0]), state, answers[0])
        else:
            update = {}
            for answer, share in zip(answers, verdict.shares.tolist(), strict=True):
                part = scale(answer.tensors(), share)
                update = add(update, part) if update else part
        samples = sum(answer.samples for answer in answers)
        parcel = Parcel("answer", {"samples": samples}, with_role("update", update))
        return [Answer(-1, parcel, samples, 0, total)]

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

    def _update(self, effect: Tensors, state: State, answer: Answer) -> Tensors:
        """Return the update whose effect comes nearest: the leading singular directions at the shared rank."""
        sent = answer.tensors()
        if effect.keys() == sent.keys():
            return effect
        start, trainable = state.shared, self.world.trainable()
        whole = add(trainable.delta_weight(start), effect)
        scaling = self.world.recipe.trainable.scaling
        update: Tensors = {}
        for path in layers(start):
            down, up = start[f"{path}.lora_A"], start[f"{path}.lora_B"]
            change = whole[f"{path}.weight"] / scaling
            change = change if change.shape == (up.shape[0], down.shape[1]) else change.T
            left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
            root = values[: down.shape[0]].sqrt()
            update[f"{path}.lora_A"] = (root[:, None] * right[: len(root)]).float() - down
            update[f"{path}.lora_B"] = (left[:, : len(root)] * root).float() - up
        return update

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


def _row(tensors: Tensors) -> Tensor:
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


def _unrow(row: Tensor, like: Tensors) -> Tensors:
    parts = torch.split(row, [like[name].numel() for name in sorted(like)])
    return {name: part.reshape(like[name].shape) for name, part in zip(sorted(like), parts, strict=True)}
