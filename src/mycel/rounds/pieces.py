"""Answers too large for memory, combined one tensor at a time: the same numbers as all at once, to the bit.

Where each tensor of the state moves by itself (``System.separable``), a round needs the state and one tensor of each
kind: old state and answers are let go of as the new state grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mycel.recipe.schema import Recipe
from mycel.rounds.system import Answer, State, System
from mycel.wire.parcel import Parcel
from mycel.wire.waiting import Shelved, Waiting


def goes_in_pieces(recipe: Recipe, system: System) -> bool:
    """Whether answers may be checked and combined one tensor at a time: nothing in the way looks at whole answers."""
    guard = recipe.guard
    looked_at = guard.sums != "plain" or guard.filter or guard.private == "user" or recipe.threat.attack
    return (
        system.separable
        and not looked_at
        and not isinstance(recipe.trainable.rank, list)
        and type(system).inspect is System.inspect
    )


def waits_in_a_file(answer: Answer) -> bool:
    """Whether an answer did not fit in memory."""
    return isinstance(answer.sent, Shelved) and answer.sent.frame.path is not None


@dataclass(frozen=True)
class Piece:
    """One tensor of an answer that waits."""

    whole: Waiting
    name: str

    def load(self) -> Parcel:
        """Decode it."""
        return Parcel(self.whole.kind, self.whole.header, {self.name: self.whole.tensors[self.name]})


def step_in_pieces(system: System, state: State, answers: Sequence[Answer]) -> State:
    """Return ``system.step(state, system.combine(state, answers))``; ``state`` is used up on the way."""
    loaded = {
        answer.node: Waiting.of(answer.sent.frame, answer.sent.limits)
        for answer in answers
        if isinstance(answer.sent, Shelved) and answer.sent.frame.path is not None
    }
    whole = [answer if answer.node in loaded else replace(answer, sent=answer.parcel) for answer in answers]
    moved = {}
    for name in list(state.shared):
        part = state.but(shared={name: state.shared.pop(name)})
        pieces = [
            replace(answer, sent=Piece(loaded[answer.node], f"update/{name}"))
            if answer.node in loaded
            else replace(answer, sent=_only(answer.parcel, f"update/{name}"))
            for answer in whole
        ]
        moved[name] = system.step(part, system.combine(part, pieces)).shared[name]
    return state.but(shared=moved)


def _only(parcel: Parcel, name: str) -> Parcel:
    """Cut an answer that fits in memory down to one tensor."""
    return Parcel(parcel.kind, parcel.header, {name: parcel.tensors[name]})
