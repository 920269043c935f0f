"""Islands of rank processes as parties of rounds: an island of two is one of one, and outlives its ranks' deaths."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed

from mycel.collectives.overlap import Made, Overlap
from mycel.collectives.processes import RankProcesses
from mycel.collectives.ranks import Meeting, process_group
from mycel.data.parties import load_parties
from mycel.engines.children import start
from mycel.engines.nursery import Nursery
from mycel.errors import RecipeError
from mycel.federation.demo import Village
from mycel.pretrain.proving import pretraining
from mycel.recipe.schema import Layout, Recipe
from mycel.rounds.coordinator import Coordinator
from mycel.rounds.laboratory import Laboratory, laboratory
from mycel.rounds.registry import load_system
from mycel.rounds.simulation import Finished
from mycel.run.execute import run_recipe
from mycel.wire.algebra import norm, subtract

pytestmark = pytest.mark.slow
SMALL: dict[str, Any] = {
    "data.examples": 30,
    "data.held_out": 2,
    "data.max_length": 16,
    "data.count": 2,
    "training.batch_size": 4,
    "rounds.count": 3,
    "rounds.local_steps": 6,
    "rounds.evaluate_every": 100,
    "fleet.devices": "islands",
}
PAIR = {"layout.data": 2}
PLAIN = {"training.optimizer": "sgd", "training.learning_rate": 0.5}


@pytest.fixture(scope="module")
def isles() -> Iterator[Laboratory]:
    """A laboratory whose islands' ranks are this process's own."""
    with laboratory(workers=0, base="micro") as opened:
        yield opened


def recipe(lab: Laboratory, system: str, changes: dict[str, Any] | None = None) -> Recipe:
    return lab.recipe(system, pretraining({**SMALL, **(changes or {})}))


def apart(one: Finished, other: Finished) -> float:
    return norm(subtract(one.state.shared, other.state.shared)) / norm(other.state.shared)


@pytest.fixture(scope="module")
def single(isles: Laboratory) -> Finished:
    return isles.run(recipe(isles, "diloco"))


@pytest.fixture(scope="module")
def paired(isles: Laboratory) -> Finished:
    return isles.run(recipe(isles, "diloco", PAIR))


def ranks_of(lab: Laboratory, count: int = 2) -> RankProcesses:
    return lab.place.host.islands[count]


def after_first_round(act: Callable[[], None]) -> Callable[[Coordinator], None]:
    """Return a watcher that lets ``act`` happen in a thread once the second round is under way."""

    def watch(coordinator: Coordinator) -> None:
        if coordinator.progress.version == 1:
            threading.Thread(target=act, daemon=True).start()

    return watch


def kill(island: RankProcesses, rank: int, times: int = 1) -> None:
    """Kill one of the ranks in the middle of its work, and again each time the island has begun anew."""
    before: list[int] = []
    for _ in range(times):
        while len(found := island.pids()) < 2 or found == before:
            time.sleep(0.01)
        time.sleep(0.05)
        before = found
        os.kill(found[rank], signal.SIGKILL)


@pytest.mark.parametrize("inside", [PAIR, {"layout.pipeline": 2, "layout.micro_batches": 2}])
def test_an_island_of_two_ranks_comes_to_the_state_of_one(
    isles: Laboratory, single: Finished, inside: dict[str, Any]
) -> None:
    finished = isles.run(recipe(isles, "diloco", inside))
    assert 0 < apart(finished, single) < 1e-6
    assert not finished.progress.drops
    assert finished.loss() == pytest.approx(single.loss(), rel=1e-6)


def test_gradients_of_an_islands_ranks_are_those_of_one(isles: Laboratory) -> None:
    alone = isles.run(recipe(isles, "synchronous", PLAIN))
    together = isles.run(recipe(isles, "synchronous", {**PLAIN, **PAIR}))
    assert apart(together, alone) < 1e-6


@pytest.mark.parametrize("rank", [0, 1])
def test_an_island_that_lost_a_rank_begins_again_from_its_brief(isles: Laboratory, paired: Finished, rank: int) -> None:
    island, before = ranks_of(isles), ranks_of(isles).restarts
    changed = recipe(isles, "diloco", PAIR)
    finished = isles.run(changed, watch=after_first_round(lambda: kill(island, rank)))
    assert island.restarts == before + 1
    assert finished.state.sha256() == paired.state.sha256()
    assert not finished.progress.drops


def test_an_island_whose_ranks_keep_dying_loses_its_answer_and_the_others_go_on(
    isles: Laboratory, paired: Finished
) -> None:
    island, before = ranks_of(isles), ranks_of(isles).restarts
    watch = after_first_round(lambda: kill(island, 1, times=island.attempts))
    finished = isles.run(recipe(isles, "diloco", PAIR), watch=watch)
    assert island.restarts == before + island.attempts
    assert finished.progress.drops["invalid"] == 1
    assert finished.progress.version == paired.progress.version
    assert finished.state.sha256() != paired.state.sha256()
    assert finished.loss() == pytest.approx(paired.loss(), rel=0.05)


def test_what_the_ranks_of_a_party_cannot_share_out_is_refused(isles: Laboratory) -> None:
    with pytest.raises(RecipeError, match="'fedavg' works in one process"):
        load_system(Recipe(layout=Layout(data=2)))
    with pytest.raises(RecipeError, match="rows of one length"):
        load_system(recipe(isles, "diloco", {**PAIR, "data.pack": False}))
    with pytest.raises(RecipeError, match="does not divide the 4 rows of a step"):
        isles.run(recipe(isles, "diloco", {"layout.data": 3}))


def rounds_of(folder: Path) -> int:
    path = folder / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return sum(json.loads(line)["event"] == "round" for line in lines if line.endswith("\n"))


def join_under_torchrun(made: Village, name: str) -> None:
    starter = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    key, data = made.folder / "keys" / "parties" / f"{name}.pem", made.folder / "data" / name
    words = ["-m", "mycel", "join", made.address, "--key", str(key), "--data", str(data)]
    environ = {**made.environment, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    made.parties[name] = start([*starter, *words], environ, made.folder / f"{name}.log", last_word=signal.SIGTERM)


def island_recipe() -> Recipe:
    changes = {**SMALL, **PAIR, "rounds.count": 2, "data.examples": 24, "data.held_out": 4, "rounds.evaluate_every": 1}
    changes |= {"rounds.patience": 10}  # an island that lost a rank is slow, and not to be found silent
    return Recipe(system="diloco").replace(pretraining({**changes, "engine.workers": 0}))


@pytest.mark.timeout(400)
def test_on_a_federation_a_party_that_is_an_island_outlives_a_killed_rank(tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="the federation extra is not installed")
    wanted = island_recipe()
    reference = run_recipe(wanted, tmp_path / "reference")
    (tmp_path / "isles.toml").write_text(wanted.to_toml(), encoding="utf-8")
    parties = load_parties(wanted.data, wanted.seed)
    made = Village(tmp_path / "village", [party.name for party in parties])
    try:
        made.start_coordinator()
        for party in parties:
            made.give(party.name, party)
        made.join(parties[0].name, "--nproc", "2")
        join_under_torchrun(made, parties[1].name)
        made.wait_until_listening()
        out = tmp_path / "run"
        words = ("run", str(tmp_path / "isles.toml"), "--out", str(out), "--on", made.address)
        process = made.start(*words, log="run")
        while process.poll() is None and not rounds_of(out):
            time.sleep(0.05)
        party = psutil.Process(made.parties[parties[0].name].pid)
        (nursery,) = [child for child in party.children() if child.cmdline() == party.cmdline()]
        assert len(nursery.children()) == 2
        nursery.children()[-1].kill()
        assert process.wait() == 0, (made.folder / "run.log").read_text()[-2000:]
    finally:
        made.end()
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert result["state_sha256"] == reference["state_sha256"]
    assert result["dropped"] == {"late": 0, "invalid": 0, "lost": 0}


def summing(connection: Connection) -> None:
    """Be a rank whose sums travel while it computes: the next stage's part is what the stage before came to."""
    with process_group(Meeting(**json.loads(connection.recv_bytes()))):
        rank, overlap = torch.distributed.get_rank(), Overlap()
        first: Made = ({"w": torch.full((3,), rank + 1.0)}, rank + 1)
        second, (one, some) = overlap.stage(lambda: ({"w": first[0]["w"] * 10}, first[1] * 2), first)
        third, (other, more) = overlap.stage(lambda: ({"w": second[0]["w"] * 100}, second[1] * 2), second)
        totals = [[*one["w"].tolist(), some], [*other["w"].tolist(), more]]
        overlap.close()
        connection.send_bytes(json.dumps([totals, third[0]["w"].tolist(), overlap.sent]).encode())


def test_a_stage_sums_what_was_made_before_while_the_next_is_made(tmp_path: Path) -> None:
    nursery = Nursery(summing)
    try:
        ranks = [nursery.start() for _ in range(2)]
        for rank, child in enumerate(ranks):
            told = {"file": str(tmp_path / "meeting"), "rank": rank, "size": 2}
            child.connection.send_bytes(json.dumps(told).encode())
        found = [json.loads(child.connection.recv_bytes()) for child in ranks]
        for child in ranks:
            child.connection.close()
    finally:
        nursery.close()
    for rank, (totals, made, sent) in enumerate(found):
        assert totals == [[3.0, 3.0, 3.0, 3], [30.0, 30.0, 30.0, 6]]
        assert made == [1000.0 * (rank + 1)] * 3
        assert sent == 2 * 3 * 4  # two sums, in each of which a rank of two sends as much as a whole tensor
