"""Ranks of `mycel run --nproc` that are killed: the run ends by itself, with the loss curve of an undisturbed one."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from mycel.engines.children import LOOPBACK, free_port
from mycel.errors import EngineError
from mycel.recipe import load_recipe
from mycel.run.island import run_island
from mycel.run.launching import smaller
from small_runs import command, environment, events_of

pytestmark = pytest.mark.slow
SHORT = (
    "rounds.count=10",
    "data.examples=24",
    "data.held_out=4",
    "data.max_length=32",
    "training.batch_size=4",
    "layout.data=2",
    "layout.pipeline=1",
    "layout.micro_batches=1",
    "layout.checkpoint_every=2",
)


@dataclass
class Disturbed:
    """What became of a run whose ranks were killed, and of one that was left alone."""

    result: dict[str, Any]
    losses: dict[int, float]
    words: str
    undisturbed: dict[str, Any]


def steps_of(folder: Path) -> int:
    path = folder / "events.jsonl"
    return path.read_text(encoding="utf-8").count('"event": "step"') if path.exists() else 0


def ranks_of(parent: psutil.Process, but: set[int]) -> list[psutil.Process]:
    return [child for child in parent.children() if child.pid not in but]


def undisturbed(folder: Path) -> dict[str, Any]:
    """Be the only rank of an island that nobody disturbs."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in alone.items():
            patch.setenv(name, value)
        found = run_island(load_recipe("island", [*SHORT, "layout.data=1"]), folder, resume=False)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    """Kill rank 1 after three steps; then rank 0 of those that go on, before they have come anywhere."""
    place = tmp_path_factory.mktemp("faults")
    left = undisturbed(place / "left")
    words = command("run", "island", *SHORT, "--nproc", "2", "--out", "killed", "--json")
    with (place / "words").open("wb") as said:
        process = subprocess.Popen(words, cwd=place, env=environment(), stdout=said, stderr=said)
    try:
        while process.poll() is None and steps_of(place / "killed") < 4:
            time.sleep(0.01)
        parent = psutil.Process(process.pid)
        first = ranks_of(parent, set())
        first[1].kill()
        while process.poll() is None and len(ranks_of(parent, {each.pid for each in first})) < 2:
            time.sleep(0.01)
        ranks_of(parent, {each.pid for each in first})[0].kill()
        assert process.wait(120) == 0, (place / "words").read_text(encoding="utf-8")[-2000:]
    finally:
        process.kill()
        process.wait()
    losses = {event["step"]: event["loss"] for event in events_of(place / "killed") if event["event"] == "step"}
    found = json.loads((place / "killed/result.json").read_text(encoding="utf-8"))
    return Disturbed(found, losses, (place / "words").read_text(encoding="utf-8"), left)


def test_a_run_whose_ranks_are_killed_has_the_curve_of_an_undisturbed_one(disturbed: Disturbed) -> None:
    wanted = disturbed.undisturbed["curve"]["losses"]
    assert [disturbed.losses[step] for step in range(10)] == pytest.approx(wanted, rel=1e-5)
    curve = disturbed.result["curve"]
    assert curve["first_step"] in range(0, 10, 2)  # how far it came before that was seen is the machine's affair
    assert curve["first_step"] == len(curve["before"])
    assert [*curve["before"], *curve["losses"]] == pytest.approx(wanted, rel=1e-5)
    assert disturbed.result["final"]["loss"] == pytest.approx(disturbed.undisturbed["final"]["loss"], rel=1e-5)


def test_ranks_that_are_killed_again_without_progress_go_on_as_fewer(disturbed: Disturbed) -> None:
    assert disturbed.words.count("a rank was killed; going on") == 2
    assert disturbed.result["ranks"] == 1


def test_fewer_ranks_divide_what_more_did_and_one_is_the_last() -> None:
    recipe = load_recipe("island", ["training.batch_size=6", "layout.data=3", "layout.pipeline=1"])
    layout = smaller(recipe, 3)
    assert (layout.data, layout.tensor, layout.pipeline) == (2, 1, 1)
    with pytest.raises(EngineError, match="out of memory"):
        smaller(recipe, 1)
