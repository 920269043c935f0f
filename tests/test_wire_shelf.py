"""Frames that wait in files come back as they were, leave nothing behind, and change no result."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mycel.errors import EngineError
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.simulation import Simulation
from mycel.wire.shelf import Shelf


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


@pytest.mark.parametrize("system", ["fedavg", "scaffold", "flora_stacking"])
def test_rounds_over_shelved_answers_end_in_the_same_state(lab: Laboratory, tmp_path: Path, system: str) -> None:
    recipe = lab.recipe(system, {"rounds.count": 2, "rounds.local_steps": 2})
    whole = lab.run(recipe)
    shelf = Shelf(budget=0, folder=tmp_path)
    again = Simulation(whole.arm, whole.world, lab.place.labour, shelf=shelf).run()
    assert again.state.sha256() == whole.state.sha256()
    assert not list(tmp_path.iterdir())
