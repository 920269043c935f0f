"""What a curious party and an eavesdropper make of what they see: as much as is there, and no more."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from mycel.errors import ParcelError
from mycel.guard.attacks.inversion import read_cut
from mycel.guard.audit import Audit, Private
from mycel.rounds.assaults import Scene, stage
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.observers import CURIOUS, content_length, curious_party, eavesdropper, observe, on_the_line, under_tls
from mycel.wire.algebra import cosine, subtract, weighted_mean
from mycel.wire.parcel import Parcel

RUN: dict[str, Any] = {
    "data.examples": 16,
    "data.held_out": 8,
    "data.max_length": 32,
    "rounds.count": 2,
    "rounds.local_steps": 4,
    "training.learning_rate": 1e-2,
    "rounds.evaluate_every": 2,
    "guard.replayable": True,
    "knobs": {"server_rate": 1.5},
}
GUARDS: dict[str, dict[str, Any]] = {"open": {}, "masked": {"guard.sums": "masked", "wire.codec": "fixed(16,0.5)"}}


@pytest.fixture(scope="module")
def scenes(lab: Laboratory) -> dict[str, Scene]:
    return {name: stage(lab, lab.recipe("fedavg", {**RUN, **more})) for name, more in GUARDS.items()}


def test_a_party_works_the_others_sum_out_from_two_briefs_also_under_masks(scenes: dict[str, Scene]) -> None:
    others = [node for node in range(len(scenes["open"].parties)) if node != CURIOUS]
    for version in range(2):
        sent = scenes["open"].seen[version]
        weights = [float(len(scenes["open"].parties[node].train)) for node in others]
        truth = weighted_mean([sent[node] for node in others], weights)
        for scene in scenes.values():
            found = curious_party(scene).seen[version]
            assert found.keys() == set(others)
            assert cosine(found[others[0]], truth) > 0.98
    assert cosine(scenes["open"].seen[0][CURIOUS], curious_party(scenes["open"]).seen[0][others[0]]) < 0.9


def test_in_the_clear_an_eavesdropper_sees_what_the_coordinator_does(scenes: dict[str, Scene]) -> None:
    for name, scene in scenes.items():
        view = eavesdropper(scene)
        assert [state.sha256() for state in view.states] == [state.sha256() for state in scene.states]
        assert all(bool(update) == (name == "open") for update in view.seen[0].values())
        same = [subtract(view.seen[0][node], update) for node, update in scene.seen[0].items()]
        assert not any(bool(value.any()) for difference in same for value in difference.values())


def test_under_tls_frames_are_unreadable_and_exactly_as_long_as_they_are(scenes: dict[str, Scene]) -> None:
    frames = [crossing.frame for crossing in scenes["open"].crossed[:3]]
    frames += [random.Random(size).randbytes(size) for size in (1, 16_383, 16_384, 16_385, 100_000)]
    lines = on_the_line(frames)
    assert [content_length(len(line)) for line in lines] == [len(frame) for frame in frames]
    for line in lines:
        with pytest.raises(ParcelError):
            Parcel.from_bytes(line)
    secret = "the patient in bed four has an unusual reaction"
    told = Parcel("answer", {"note": secret}).to_bytes()
    for content, found in ((told, True), (on_the_line([told])[0], False)):
        audit = Audit(Private(texts=[secret]))
        audit.look(content, "the line")
        assert bool(audit.findings) == found
    assert under_tls(scenes["open"])[0] == 0.0


def test_every_observer_gets_a_row_and_masks_leave_a_party_what_it_had(scenes: dict[str, Scene]) -> None:
    rows = {row.pop("observer"): row for row in observe(scenes["masked"])}
    assert rows["coordinator"] == rows["eavesdropper, in the clear"]
    assert rows["coordinator"]["domain"] == pytest.approx(1 / 6)
    assert rows["a party"]["membership"] == rows["coordinator"]["membership"] > 0.5
    assert rows["eavesdropper, TLS"]["membership"] == "-"


def test_what_is_padded_before_it_crosses_is_not_read_back(lab: Laboratory, scenes: dict[str, Scene]) -> None:
    scene, model = scenes["open"], lab.open_base().model
    texts = [scene.table(party.train).ids[:320].long().reshape(-1, 32) for party in scene.parties[:3]]
    noise = torch.Generator().manual_seed(1)

    def padded(hidden: Tensor) -> Tensor:
        return hidden + 1e6 * torch.randn(hidden.shape, generator=noise)

    public, secret = torch.cat(texts[1:]), texts[0]
    assert read_cut(model, 0, public, secret) > 0.9
    assert read_cut(model, 0, public, secret, padded) < 0.2
