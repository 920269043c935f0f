"""What a coordinator does with answers that are wrong: they are left out and counted, and the run goes on."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from mycel.errors import ParcelError
from mycel.finetune.fedavg import FedAvg
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.party import Party
from mycel.rounds.system import System
from mycel.wire.parcel import Parcel
from pulling import Change, Rig, closed_form, rig_over


@pytest.fixture
def rig(lab: Laboratory) -> Callable[..., Rig]:
    return rig_over(lab)


def test_nan_answers_are_left_out_and_counted_and_the_run_goes_on(rig: Callable[..., Rig]) -> None:
    def spoil(node: int, answer: Parcel) -> Parcel:
        bad = torch.tensor([1.0, math.nan, math.inf])
        return Parcel("answer", answer.header, {"update/w": bad}) if node in (1, 4) else answer

    federation = rig({}, change=spoil)
    state = federation.run()
    assert torch.allclose(state.shared["w"], closed_form([(0, 2, 3, 5)] * 3))
    assert federation.coordinator.progress.drops == {"invalid": 6}
    for event in federation.of("drop"):
        assert event["node"] in (1, 4)
        assert "NaN or infinity" in event["detail"]


UNSOUND: dict[str, tuple[Change, str]] = {
    "not a frame": (lambda node, answer: b"\x00" * 40, "not that of a parcel"),
    "nothing": (lambda node, answer: b"", "truncated"),
    "another shape": (lambda node, answer: Parcel("answer", answer.header, {"update/w": torch.ones(4)}), "the shape"),
    "another name": (lambda node, answer: Parcel("answer", answer.header, {"update/v": torch.ones(3)}), "not expected"),
    "no tensor": (lambda node, answer: Parcel("answer", answer.header), "missing"),
    "whole numbers": (
        lambda node, answer: Parcel("answer", answer.header, {"update/w": torch.ones(3, dtype=torch.int64)}),
        "floating-point",
    ),
    "a role of its own": (
        lambda node, answer: Parcel("answer", answer.header, {**answer.tensors, "examples/0": torch.ones(1)}),
        "only update may leave",
    ),
    "a report of its own": (
        lambda node, answer: Parcel("answer", {**answer.header, "name": 3}, answer.tensors),
        "'name' is not declared",
    ),
    "a report of text": (
        lambda node, answer: Parcel("answer", {**answer.header, "loss": "secret"}, answer.tensors),
        "only numbers",
    ),
    "fewer than no samples": (
        lambda node, answer: Parcel("answer", {**answer.header, "samples": -7}, answer.tensors),
        "counts examples",
    ),
    "a list of samples": (
        lambda node, answer: Parcel("answer", {**answer.header, "samples": [1, 2]}, answer.tensors),
        "only numbers",
    ),
    "no samples": (
        lambda node, answer: Parcel("answer", {"loss": 1.0}, answer.tensors),
        "'samples' is missing",
    ),
    "a loss beyond numbers": (
        lambda node, answer: Parcel("answer", {**answer.header, "loss": 10**4000}, answer.tensors),
        "only numbers",
    ),
    "a list of losses": (
        lambda node, answer: Parcel("answer", {**answer.header, "loss": [1.0] * 9}, answer.tensors),
        "only numbers",
    ),
    "scores beyond numbers": (
        lambda node, answer: Parcel("answer", {**answer.header, "scores": [10**4000, 1, 1]}, answer.tensors),
        "only numbers",
    ),
    "scores that take away": (  # what all parties scored would come to no tokens, and a loss that is no number
        lambda node, answer: Parcel("answer", {**answer.header, "scores": [1.0, -17, -17]}, answer.tensors),
        "so many are hits",
    ),
    "scores of parts": (
        lambda node, answer: Parcel("answer", {**answer.header, "scores": [1.0, 1.5, 1]}, answer.tensors),
        "so many are hits",
    ),
    "scores without end": (
        lambda node, answer: Parcel("answer", {**answer.header, "scores": [1.0] * 9}, answer.tensors),
        "loss, tokens and hits",
    ),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_unsound_answers_are_left_out_whatever_is_wrong_with_them(rig: Callable[..., Rig], name: str) -> None:
    change, sentence = UNSOUND[name]
    federation = rig({"rounds.count": 1}, change=lambda node, answer: change(node, answer) if node == 3 else answer)
    state = federation.run()
    assert torch.allclose(state.shared["w"], closed_form([(0, 1, 2, 4, 5)]))
    (drop,) = federation.of("drop")
    assert (drop["node"], drop["reason"]) == (3, "invalid")
    assert sentence in drop["detail"]


def test_a_party_that_raises_is_left_out_with_its_sentence(rig: Callable[..., Rig]) -> None:
    def refuse(node: int, answer: Parcel) -> Parcel:
        if node == 5:
            raise ParcelError("this party has had enough")
        return answer

    federation = rig({"rounds.count": 2}, change=refuse)
    assert torch.allclose(federation.run().shared["w"], closed_form([range(5)] * 2))
    assert {event["detail"] for event in federation.of("drop")} == {"this party has had enough"}


class Leaky(FedAvg):
    """Puts what must stay home into its answer."""

    def work(self, brief: Parcel, party: Party) -> Parcel:
        answer = super().work(brief, party)
        return Parcel("answer", answer.header, {**answer.tensors, "personal/secret": torch.ones(2)})


def test_a_role_that_is_not_declared_is_refused_at_the_party(lab: Laboratory) -> None:
    recipe = lab.recipe("fedavg", {"rounds.count": 1, "rounds.local_steps": 1})
    world = lab.world(recipe)
    system: System = Leaky(recipe)
    world.site.system = system
    frame = system.brief(system.begin(world), 0).to_bytes()
    with pytest.raises(ParcelError, match=r"'personal/secret' has the role 'personal'; only update may leave a party"):
        world.site.handle(0, frame, b"")
