"""The coordinating process is killed, again and again in one run, at points drawn over its events."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dying_runs import KILLED, Nursery, Point, nursery
from mycel.recipe import load_recipe
from mycel.run.execute import run_recipe
from small_runs import without_seconds

PARTIES, ROUNDS = 3, 5
RECIPE = [
    f"data.count={PARTIES}",
    'data.parties="dirichlet(0.5)"',
    "data.examples=16",
    "data.held_out=4",
    "data.max_length=32",
    "compare=[]",
    "model.base=micro",
    f"rounds.count={ROUNDS}",
    "rounds.local_steps=1",
    "trainable.rank=2",
    "wire.error_feedback=true",  # so that what stays at home matters too
    'wire.codec="topk(0.2)"',
    "engine.workers=0",
]


def points(seed: int) -> list[Point]:
    """One point of each kind, in the order of a run, each at a round and a party that the seed draws."""
    draw = random.Random(seed)
    first, second, third = sorted(draw.sample(range(ROUNDS), 3))
    return [
        Point("start"),  # before the first ask
        Point("ask", first, draw.randint(1, PARTIES)),  # some are asked, nobody has answered
        Point("answer", second, draw.randint(1, PARTIES - 1)),  # some have answered
        Point("round", third + 1),  # combined, and not yet in the checkpoint
        Point("ask", ROUNDS, draw.randint(1, PARTIES)),  # in delivery
        Point("answer", ROUNDS, draw.randint(1, PARTIES)),
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with nursery(environment, tmp_path_factory.mktemp("nursery") / "log") as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_recipe(load_recipe("quickstart", RECIPE), tmp_path_factory.mktemp("undisturbed") / "run")


def test_killed_at_any_point_again_and_again_it_ends_as_if_it_had_not(
    place: Nursery, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for number, point in enumerate(points(seed=0)):
        assert place.piece(RECIPE, out, point, resume=number > 0) == KILLED, point
        assert not (out / "result.json").exists()
    assert place.piece(RECIPE, out, None, resume=True) == 0
    result = json.loads((out / "result.json").read_text())
    assert without_seconds(result) == without_seconds(undisturbed)
    assert not [path.name for path in (out / "work").iterdir() if path.suffix == ".frame"]
