"""The laws of combining, and what is refused because it breaks one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from mycel.rounds.laboratory import Laboratory
from mycel.rounds.system import Answer, Outcome, State
from mycel.testing import check_combine
from pulling import Pull, Rig, rig_over


@pytest.fixture
def rig(lab: Laboratory) -> Callable[..., Rig]:
    return rig_over(lab)


def test_the_pull_obeys_the_laws_of_combining(rig: Callable[..., Rig]) -> None:
    federation = rig({"rounds.count": 1})
    state = federation.run()
    check_combine(federation.system, state, federation.system.seen[0])


class Last(Pull):
    """The last answer wins."""

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        return Outcome(shared=answers[-1].tensors())


class Sum(Pull):
    """Adds instead of averaging."""

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        return Outcome(shared={"w": torch.stack([answer.tensors()["w"] for answer in answers]).sum(0)})


class Even(Pull):
    """Averages without weights."""

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        return Outcome(shared={"w": torch.stack([answer.tensors()["w"] for answer in answers]).mean(0)})


class InPlace(Pull):
    """Adds into the first answer's own tensor."""

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        first = answers[0].parcel.tensors["update/w"]
        return Outcome(shared={"w": first.mul_(0.5)})


class Moody(Pull):
    """Combines differently each time."""

    def combine(self, state: State, answers: Sequence[Answer]) -> Outcome:
        outcome = super().combine(state, answers)
        return Outcome(shared={"w": outcome.shared["w"] * (1 + len(self.seen))})


class Greedy(Pull):
    """Moves the state that it is given."""

    def step(self, state: State, outcome: Outcome) -> State:
        state.shared["w"].add_(outcome.shared["w"])
        return state


@pytest.mark.parametrize(
    ("kind", "law"),
    [
        (Last, "order of the answers"),
        (Sum, "make what one of them makes"),
        (Even, "all the weight"),
        (InPlace, "leave the answers"),
        (Moody, "is pure"),
        (Greedy, "leave the state"),
    ],
)
def test_the_suite_refuses_what_does_not_combine(rig: Callable[..., Rig], kind: type[Pull], law: str) -> None:
    federation = rig({"rounds.count": 1})
    state = federation.run()
    broken = kind(federation.system.recipe)
    broken.seen = []
    with pytest.raises(AssertionError, match=law):
        check_combine(broken, state, federation.system.seen[0])
