"""The laws that every ``combine`` obeys, ours or a stranger's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from mycel.rounds.system import Answer, Outcome, State, System
from mycel.testing.laws import law
from mycel.wire.algebra import with_role
from mycel.wire.parcel import Tensors

TOLERANCE = 1e-5  # relative: float32 sums in another order

Effect = Callable[[State, Outcome], Tensors]


def check_combine(
    system: System,
    state: State,
    answers: Sequence[Answer],
    effect: Effect | None = None,
    shares: bool = True,
) -> None:
    """Hold a system's ``combine`` to its contract; raise ``AssertionError`` with the law it breaks.

    Parameters
    ----------
    system : System
        The system whose ``combine`` and ``step`` are checked; neither may remember anything.
    state : State
        A state of the middle of a run.
    answers : sequence of Answer
        At least three sound answers, of different nodes, with different weights and values.
    effect : callable, optional
        What an outcome does to a state, as tensors to compare. By default the outcome's shared part and its change to
        the base; a system whose outcome is a stack of factors gives their product instead.
    shares : bool
        Whether parties share what is made. For a system that only keeps each party's state apart, the fixed point and
        the law of weights have no meaning and are left out.
    """
    if len({answer.node for answer in answers}) < 3:
        raise ValueError(f"{len(answers)} answers of different nodes do not show how they combine: give at least three")
    seen = effect or _shared_and_base
    answers = [replace(answer, sent=answer.parcel) for answer in answers]  # decoded once: who spoils one is found out
    _check_purity(system, state, answers)
    _check_order(system, state, answers)
    if shares:
        _check_fixed_point(system, state, answers, seen)
        _check_weights(system, state, answers, seen)


def _shared_and_base(state: State, outcome: Outcome) -> Tensors:
    return with_role("shared", outcome.shared) | with_role("base", outcome.base)


def _everything(outcome: Outcome) -> Tensors:
    tensors = (
        with_role("shared", outcome.shared) | with_role("base", outcome.base) | with_role("server", outcome.server)
    )
    for node, own in outcome.parties.items():
        tensors |= with_role(f"party.{node}", own)
    return tensors


def _alike(one: Tensors, other: Tensors, tolerance: float = TOLERANCE) -> bool:
    if one.keys() != other.keys():
        return False
    for name, tensor in one.items():
        if tensor.shape != other[name].shape:
            return False
        size = max(float(tensor.abs().max()), float(other[name].abs().max())) if tensor.numel() else 0.0
        if tensor.numel() and float((tensor - other[name]).abs().max()) > tolerance * size:
            return False
    return True


def _check_purity(system: System, state: State, answers: Sequence[Answer]) -> None:
    before = copy.deepcopy((state, list(answers)))
    outcome = system.combine(state, answers)
    once = copy.deepcopy(_everything(outcome))
    system.step(state, outcome)
    law(state.sha256() == before[0].sha256(), "combine() and step() leave the state that they are given alone")
    untouched = all(_same(one, other) for one, other in zip(answers, before[1], strict=True))
    law(untouched, "combine() and step() leave the answers that they are given alone")
    again = _everything(system.combine(state, answers))
    law(_alike(once, again, 0.0), "combine() is pure: the same answers, the same outcome to the bit")


def _same(one: Answer, other: Answer) -> bool:
    return one.parcel.header == other.parcel.header and all(
        torch.equal(tensor, other.parcel.tensors[name]) for name, tensor in one.parcel.tensors.items()
    )


def _check_order(system: System, state: State, answers: Sequence[Answer]) -> None:
    expected = _everything(system.combine(state, answers))
    for turned in (answers[::-1], [*answers[1:], answers[0]]):
        found = _everything(system.combine(state, turned))
        law(_alike(found, expected), "the order of the answers does not matter")


def _check_fixed_point(system: System, state: State, answers: Sequence[Answer], seen: Effect) -> None:
    model = answers[0]
    alike = [replace(model, node=answer.node, weight=answer.weight, samples=answer.samples) for answer in answers]
    one = seen(state, system.combine(state, [model]))
    law(any(bool(tensor.any()) for tensor in one.values()), "an answer that says something has an effect")
    found = seen(state, system.combine(state, alike))
    law(_alike(found, one), "answers that all say the same make what one of them makes, whatever their weights")


def _check_weights(system: System, state: State, answers: Sequence[Answer], seen: Effect) -> None:
    expected = seen(state, system.combine(state, answers))
    scaled = [replace(answer, weight=4 * answer.weight) for answer in answers]
    law(_alike(seen(state, system.combine(state, scaled)), expected), "only the shares of the weights matter")
    for favoured in answers:
        tilted = [
            replace(answer, weight=answer.weight * (1e9 if answer.node == favoured.node else 1)) for answer in answers
        ]
        alone = seen(state, system.combine(state, [favoured]))
        found = seen(state, system.combine(state, tilted))
        law(_alike(found, alone, 1e-3), f"an answer with all the weight decides alone: node {favoured.node}'s does not")
