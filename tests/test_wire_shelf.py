"""Frames that wait in files come back as they were, leave nothing behind, and change no result."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from mycel.errors import EngineError
from mycel.recipe.schema import Recipe
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.pieces import step_in_pieces
from mycel.rounds.registry import load_system
from mycel.rounds.simulation import Simulation
from mycel.rounds.system import Answer
from mycel.wire.algebra import with_role
from mycel.wire.parcel import Limits, Parcel
from mycel.wire.shelf import Shelf
from mycel.wire.waiting import Shelved
from rounds_by_hand import SMALL


def test_a_shelf_gives_back_what_was_put_there_and_its_room(tmp_path: Path) -> None:
    frames = [random.Random(size).randbytes(100 + size) for size in range(8)]
    shelf = Shelf(budget=250, folder=tmp_path)
    kept = [shelf.keep(frame) for frame in frames]
    assert shelf.held == 201
    assert len(list(tmp_path.iterdir())) == 6
    assert [bytes(each) for each in kept] == frames
    assert [len(each) for each in kept] == [len(frame) for frame in frames]
    assert shelf.keep(kept[5]) is kept[5]
    del kept[0]
    assert shelf.held == 101
    kept.clear()
    assert not list(tmp_path.iterdir())
    assert shelf.held == 0


def test_a_shelf_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"of 3 bytes cannot be set aside in .*gone: No such file.*--resume"):
        Shelf(budget=0, folder=tmp_path / "gone").keep(b"abc")
    parcel = Parcel("work", {}, {"shared/a": torch.ones(2)})
    with pytest.raises(EngineError, match=r"of 8 bytes cannot be set aside in .*os error 2.*--resume"):
        Shelf(folder=tmp_path).file(lambda path: parcel.to_file(path / "beneath"), parcel.size)
    assert not list(tmp_path.iterdir())


def test_answers_in_memory_are_decoded_once_for_all_their_tensors(lab: Laboratory, tmp_path: Path) -> None:
    recipe = Recipe().replace({"model.base": "micro", **SMALL})
    world, system = lab.world(recipe), load_system(recipe)
    state = system.begin(world)
    update = {name: torch.full_like(tensor, 0.5) for name, tensor in state.shared.items()}
    frame = Parcel("answer", {"samples": 1}, with_role("update", update)).to_bytes()
    opened: list[int] = []

    class Counted(Shelved):
        def load(self) -> Parcel:
            opened.append(1)
            return super().load()

    in_memory = Answer(0, Counted(Shelf().keep(frame), Limits()), 1, 0, 1.0)
    in_a_file = Answer(1, Shelved(Shelf(budget=0, folder=tmp_path).keep(frame), Limits()), 1, 0, 1.0)
    expected = system.step(state, system.combine(state, [in_memory, in_a_file]))
    opened.clear()
    moved = step_in_pieces(system, state.but(shared=dict(state.shared)), [in_memory, in_a_file])
    assert moved.sha256() == expected.sha256()
    assert len(opened) == 1


@pytest.mark.parametrize("system", ["fedavg", "scaffold", "flora_stacking"])
def test_rounds_over_shelved_answers_end_in_the_same_state(lab: Laboratory, tmp_path: Path, system: str) -> None:
    recipe = lab.recipe(system, {"rounds.count": 2, "rounds.local_steps": 2})
    whole = lab.run(recipe)
    shelf = Shelf(budget=0, folder=tmp_path)
    again = Simulation(whole.arm, whole.world, lab.place.labour, shelf=shelf).run()
    assert again.state.sha256() == whole.state.sha256()
    assert not list(tmp_path.iterdir())
