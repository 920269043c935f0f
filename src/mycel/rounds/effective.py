"""What combining does to the weights a model computes with, whatever its factors look like.

The effective change of a LoRA state is ``s B A`` per layer. Averaging factors is not averaging effective changes:
``mean(B) mean(A)`` has cross terms that ``mean(B A)`` lacks. The aggregation error measures the gap,

    |effective(combined) - sum_k p_k effective(state_k)| / |sum_k p_k effective(state_k)|,   p_k = n_k / sum n

over all layers together; 0 means that the parties' work reached the common model unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from mycel.models.trainable import Trainable
from mycel.rounds.party import Party
from mycel.rounds.registry import load_system
from mycel.rounds.system import Answer, State, System
from mycel.rounds.training import TrainingResult
from mycel.rounds.world import World
from mycel.wire.algebra import norm, subtract, weighted_mean
from mycel.wire.parcel import Parcel, Tensors


def aggregation_error(
    trainable: Trainable,
    states: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    combined: Mapping[str, Tensor],
) -> float:
    """Return how far the effective change of ``combined`` lies from the mean effective change of ``states``.

    Parameters
    ----------
    trainable : Trainable
        Anything that knows what a state changes; LoRA states may be of unlike ranks.
    states : sequence of mappings
        What the parties hold after their work.
    weights : sequence of float
        One for each state; not normalised.
    combined : mapping
        What the coordinator made of them.
    """
    parts = [trainable.delta_weight(_double(state)) for state in states]
    return relative_gap(trainable.delta_weight(_double(combined)), weighted_mean(parts, weights))


def relative_gap(found: Tensors, wanted: Tensors) -> float:
    """``|found - wanted| / |wanted|``; the plain distance where nothing is wanted."""
    return norm(subtract(found, wanted)) / (norm(wanted) or 1.0)


@dataclass
class Watched(Party):
    """A party whose last trained effective change can be read; for measurements inside one process only."""

    trained: list[Tensors] = field(default_factory=list)

    def train(self, trainable: Trainable, *others: Any, **options: Any) -> TrainingResult:
        """Train, and note what the trainable then changes."""
        result = super().train(trainable, *others, **options)
        self.trained[:] = [effective(trainable)]
        return result


def effective(trainable: Trainable) -> Tensors:
    """Return the effective change of the live state, in double precision where the trainable allows it."""
    return _double(trainable.delta_weight(_double(trainable.state())))


def aggregation_errors(world: World, rounds: int) -> list[float]:
    """Run a world's system in this process, every party in every round, and return each round's error.

    The gap is between what the parties' trained models compute with, weighted by examples, and what the coordinator's
    model computes with after the round; so it counts whatever is lost on the way, by any mechanism.
    """
    system = load_system(world.recipe)
    state = system.begin(world)
    homes: dict[int, Tensors] = {}
    errors = []
    for version in range(rounds):
        answers, trained = play_round(world, system, state, version, homes)
        state = system.step(state, system.combine(state, answers))
        found = system.adopt(_dated(system.brief(state, -1), version + 1), world.observer(-1, version + 1))
        errors.append(relative_gap(effective(found), weighted_mean(trained, [answer.weight for answer in answers])))
    return errors


def play_round(
    world: World, system: System, state: State, version: int, homes: dict[int, Tensors]
) -> tuple[list[Answer], list[Tensors]]:
    """Let every party work once in this process; return the answers and what each trained model changes.

    ``homes`` is what the parties keep from round to round; it is brought up to date.
    """
    answers, trained = [], []
    for node in range(len(world.nodes)):
        party = _watch(world.site.party(node, version, homes.get(node)))
        brief = system.abridge(system.brief(state, node), state, node)
        answer = system.work(_dated(brief, version), party)
        system.inspect(state, node, answer)
        homes[node] = party.personal
        answers.append(Answer(node, answer, party.samples, 0, float(party.samples)))
        trained.append(party.trained[0])
    return answers, trained


def _watch(party: Party) -> Watched:
    return Watched(**{about.name: getattr(party, about.name) for about in fields(party)})


def _dated(brief: Parcel, version: int) -> Parcel:
    return Parcel(brief.kind, {**brief.header, "version": version}, brief.tensors)


def _double(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: tensor.double() for name, tensor in tensors.items()}
