"""A run that is stopped anywhere and resumed ends in the state of a run that was not."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mycel.catalog import ENTRIES
from mycel.engines.inprocess import Labour
from mycel.engines.pool import Reply
from mycel.errors import RecipeError, RunError
from mycel.finetune.fedavg_t5 import T5
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.registry import load_system
from mycel.rounds.simulation import Finished, Simulation
from mycel.rounds.world import World
from mycel.run.checkpoint import checkpoint_clock, homes_of, read_checkpoint, restore, save_checkpoint
from mycel.run.execute import run_recipe
from mycel.testing.bases import random_base
from small_runs import command, environment, events_of, mycel, small_recipe, without_seconds, write_recipe

FEEDBACK = {"wire.codec": "topk(0.2)", "wire.error_feedback": True}
LATE = {"rounds.quorum": 0.5, "rounds.patience": 0.01, "wire.brief_codec": "int8", "fleet.devices": "unequal"}
SCENES: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "synchronous, feedback": FEEDBACK,
    "buffered": {"rounds.pace": "buffered(2)", "fleet.devices": "unequal"},
    "buffered, feedback": {"rounds.pace": "buffered(2)", "fleet.devices": "unequal", **FEEDBACK},
    "sequential": {"rounds.pace": "sequential", "rounds.count": 7},
    "sequential, feedback": {"rounds.pace": "sequential", "rounds.count": 7, **FEEDBACK},
    "unreliable": {"fleet.devices": "flaky", "rounds.quorum": 0.6, "rounds.count": 5},
    "unreliable, buffered": {"fleet.devices": "flaky", "rounds.pace": "buffered(2)", "rounds.count": 8},
    "late answers, feedback": {**LATE, "rounds.count": 6, "wire.error_feedback": True, "wire.codec": "bf16"},
    "late answers, buffered": {**LATE, "rounds.pace": "buffered(2)", "rounds.count": 8, **FEEDBACK},
    "a cohort": {"rounds.cohort": 0.5, "rounds.count": 5, "rounds.evaluate_every": 2},
    "states of their own": {"system": "local"},
}
ZEROTH_ORDER = {"training.gradient": "zeroth-order", "training.optimizer": "sgd", "training.clip_norm": 0.0}
MASKED = {"wire.codec": "fixed(8,0.05)", "guard.sums": "sparsely-masked"}
PRIVATE = {"guard.private": "example", "guard.epsilon": 8.0, "guard.clip_norm": 1.0, "guard.replayable": True}
UNSAFE = {"threat.attack": "unsafe", "threat.share": 0.34}
WHOLE = {"trainable.kind": "full"}
SMALL = {"trainable.rank": 2, "data.examples": 16, "data.held_out": 4, "data.max_length": 32, "rounds.local_steps": 1}
POINTS = 12  # where each scene is stopped, spread over its events, its first and its last among them


class Stopped(Exception):
    """The process is thought to have been killed."""


class Remembering:
    """Does each piece of work once: the same party, brief and home make the same answer, so a resumed run is quick."""

    def __init__(self, labour: Labour) -> None:
        self._labour = labour
        self._known: dict[tuple[int, bytes, bytes], Reply] = {}

    def submit(self, arm: str, node: int, frame: bytes, home: bytes, due: float = 0.0) -> asyncio.Future[Reply]:
        if (node, frame, home) not in self._known:
            self._known[node, frame, home] = self._labour.submit(arm, node, frame, home, due).result()
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        future.set_result(self._known[node, frame, home])
        return future


@dataclass
class Scene:
    """One recipe, whose runs are stopped and resumed; coordinator, system and engine are new in each piece."""

    arm: str
    world: World
    labour: Labour

    def piece(self, path: Path, stop_at: int | None = None) -> tuple[Finished | None, int]:
        """Run from the checkpoint in ``path``, or from the start, until event ``stop_at`` has been logged."""
        count = 0

        def record(event: str, **fields: Any) -> None:
            nonlocal count
            json.dumps(fields, allow_nan=False)
            count += 1
            if count == stop_at:
                raise Stopped

        simulation = Simulation(self.arm, self.world, self.labour, record, lambda made: save_checkpoint(made, path))
        saved = read_checkpoint(path)
        try:
            if saved is None:
                return simulation.run(), count
            return simulation.run(homes_of(saved), checkpoint_clock(saved), lambda made: restore(made, saved)), count
        except Stopped:
            return None, count


def scene_of(lab: Laboratory, changes: dict[str, Any]) -> Scene:
    recipe = lab.recipe("fedavg", {"rounds.count": 3, **SMALL, **changes})
    load_system(recipe)
    world = lab.world(recipe)
    return Scene(f"claim-{lab._count}", world, Remembering(lab.place.labour))


def all_of(finished: Finished) -> dict[str, Any]:
    """Everything that a result is made of."""
    progress = finished.progress
    return {
        "state": finished.state.sha256(),
        "rounds": progress.rounds,
        "scores": progress.scores,
        "drops": progress.drops,
        "bytes": finished.meter.snapshot(),
        "clock": finished.virtual_seconds,
        "homes": dict(finished.homes),
    }


@pytest.mark.parametrize("name", SCENES)
def test_stopped_anywhere_and_resumed_it_ends_the_same(lab: Laboratory, tmp_path: Path, name: str) -> None:
    scene = scene_of(lab, SCENES[name])
    whole, events = scene.piece(tmp_path / "whole")
    assert whole is not None
    if name.startswith("late"):
        assert whole.progress.drops["late"] > 0  # or this scene would show nothing
    for stop in sorted({*range(1, events, max(1, events // POINTS)), events}):
        path = tmp_path / f"stopped-{stop}"
        assert scene.piece(path, stop)[0] is None
        again, _ = scene.piece(path)
        assert again is not None
        assert all_of(again) == all_of(whole), f"stopped at event {stop} of {events}"


@pytest.fixture(scope="module")
def encoder_decoder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = tmp_path_factory.mktemp("bases") / "t5"
    random_base(made, "t5")
    return {**T5, "model.base": str(made)}


@pytest.mark.parametrize("system", [entry.name for entry in ENTRIES if entry.way == "rounds"])
def test_every_system_resumes(lab: Laboratory, encoder_decoder: dict[str, Any], tmp_path: Path, system: str) -> None:
    scene = None
    own = (MASKED, PRIVATE, UNSAFE)
    for needs in (FEEDBACK, {}, ZEROTH_ORDER, encoder_decoder, WHOLE, {**WHOLE, "rounds.pace": "buffered(1)"}, *own):
        with suppress(RecipeError):
            scene = scene or scene_of(lab, {"system": system, **needs})
    assert scene is not None, "no kind of recipe suits it"
    whole, events = scene.piece(tmp_path / "whole")
    assert whole is not None
    for stop in (events // 2, events - 1):
        assert scene.piece(tmp_path / str(stop), stop)[0] is None
        again, _ = scene.piece(tmp_path / str(stop))
        assert again is not None
        assert all_of(again) == all_of(whole), f"stopped at event {stop} of {events}"


def test_stopped_again_and_again_it_still_comes_to_its_end(lab: Laboratory, tmp_path: Path) -> None:
    scene = scene_of(lab, {"rounds.count": 4, "rounds.pace": "buffered(2)", **FEEDBACK})
    whole, _ = scene.piece(tmp_path / "whole")
    assert whole is not None
    for stop in (19, 21, 26):  # a round takes twelve events or fewer, so each piece gets somewhere
        finished = None
        for _ in range(40):
            finished, _ = scene.piece(tmp_path / str(stop), stop)
            if finished:
                break
        assert finished is not None
        assert all_of(finished) == all_of(whole)


class KillAt:
    """A watcher that ends the process, so to speak, when an event has been logged."""

    def __init__(self, number: int) -> None:
        self._left = number

    def phase(self, name: str, done: int, total: int) -> None:
        """Ignore it."""

    def arm(self, name: str, total: int) -> None:
        """Ignore it."""

    def event(self, entry: dict[str, Any]) -> None:
        """Count down."""
        self._left -= 1
        if self._left == 0:
            raise Stopped


def test_a_run_with_all_its_arms_resumes_from_any_of_them(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "data", {"compare": ["local", "centralised", "personal"], "personal_steps": 2})
    whole = run_recipe(recipe, tmp_path / "whole")
    events = len(events_of(tmp_path / "whole"))
    assert events > 30
    out = tmp_path / "stopped"
    for number, step in enumerate((3, 9, 7, 16)):  # one run, stopped four times
        with pytest.raises(Stopped):
            run_recipe(recipe, out, resume=number > 0, watcher=KillAt(step))
        assert [event["n"] for event in events_of(out)] == list(range(len(events_of(out))))
    result = run_recipe(recipe, out, resume=True)
    assert without_seconds(result) == without_seconds(whole)
    assert [entry["round"] for entry in result["rounds"]] == [1, 2, 3]
    again = run_recipe(recipe, out, resume=True)  # what is finished is not done again
    assert without_seconds(again) == without_seconds(whole)


@contextmanager
def killed_after(lines: int, folder: Path, *words: str | Path) -> Iterator[None]:
    """Start ``mycel``, run the block while it lives, and kill it once its log has so many lines, of its own too."""
    events, log = folder / "run" / "events.jsonl", folder / "stderr.txt"
    lines = max(lines, 1 + (events.read_bytes().count(b"\n") if events.exists() else 0))
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command(*words), cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=stderr
        )
        try:
            while process.poll() is None and (not events.exists() or events.read_bytes().count(b"\n") < lines):
                time.sleep(0.002)
            assert process.poll() is None, log.read_text()[-3000:]
            yield
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "kills"),
    [
        ({"engine.workers": 2, "rounds.count": 20, "compare": ["local"]}, (1, 14)),
        ({"engine.workers": 2, "rounds.count": 40, "rounds.pace": "buffered(2)", **FEEDBACK}, (20,)),
    ],
)
def test_killed_for_real_and_resumed_it_ends_the_same(
    tmp_path: Path, changes: dict[str, Any], kills: tuple[int, ...]
) -> None:
    recipe, out = write_recipe(tmp_path, changes), tmp_path / "run"
    whole = run_recipe(small_recipe(tmp_path / "data", {**changes, "engine.workers": 0}), tmp_path / "whole")
    for number, lines in enumerate(kills):
        again = ["--resume"] if number else []
        with (
            killed_after(lines, tmp_path, "run", recipe, "--out", out, *again),
            pytest.raises(RunError, match=r"another run is writing to .*wait for it, or choose another folder"),
        ):
            run_recipe(small_recipe(tmp_path / "data", changes), out, resume=True)
        assert not (out / "result.json").exists()
    done = mycel("run", recipe, "--out", out, "--resume", "--json", folder=tmp_path)
    result = json.loads(done.stdout)
    for key in ("state_sha256", "rounds", "bytes", "final", "dropped"):
        assert result[key] == whole[key], key
    events_of(out)


@pytest.mark.slow
def test_an_interrupt_ends_a_run_soon_and_says_how_to_go_on(tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, {"engine.workers": 2, "rounds.count": 100_000}), tmp_path / "run"
    process = subprocess.Popen(
        command("run", recipe, "--out", out),
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background job ignores
    )
    try:
        while process.poll() is None and not (out / "work" / "system.safetensors").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=100)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, errors
    assert "mycel: stopped; `--resume` goes on from the last round" in errors
    assert "Traceback" not in errors
    events_of(out)


@pytest.fixture(scope="module")
def checkpoint(lab: Laboratory, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("checkpoint") / "whole"
    scene_of(lab, {"rounds.count": 1, **FEEDBACK}).piece(path)
    return path.read_bytes()


Damage = Callable[[bytes], bytes]


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
        lambda whole: whole[: len(whole) // 2] + b"\xff" + whole[len(whole) // 2 + 1 :],
        lambda whole: whole.replace(b"clock", b"cluck", 1),
        lambda whole: b"\x00" * 200,
    ],
)
def test_a_damaged_checkpoint_is_refused_whatever_is_damaged(tmp_path: Path, checkpoint: bytes, damage: Damage) -> None:
    path = tmp_path / "system.safetensors"
    path.write_bytes(damage(checkpoint))
    with pytest.raises(RunError, match=r"checkpoint .* is damaged .*: remove it to repeat that part of the run"):
        read_checkpoint(path)
