"""Ranks die and training goes on: the same losses and weights, no survivor started again, whatever the moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._C._distributed_c10d import TCPStore

from mycel.collectives import membership, waiting
from mycel.collectives.copies import DiskCopies, MemoryCopies
from mycel.collectives.membership import Line, announce, open_store
from mycel.collectives.waiting import group_of, receive, send
from mycel.engines.nursery import Nursery
from mycel.errors import EngineError, ParcelError, RecipeError, RunError
from mycel.models.optimizer import make_optimizer
from mycel.pretrain import drill_rank
from mycel.pretrain.drill import Outcome, drilled
from mycel.pretrain.drill_rank import TRAINING, Drill, model_of, rows_of
from mycel.recipe.schema import Layout
from mycel.run.enduring import check_enduring
from small_runs import environment, mycel

SHORT = (
    "rounds.count=60",
    "data.examples=24",
    "data.held_out=4",
    "data.max_length=32",
    "training.batch_size=4",
    "layout.data=1",
    "layout.checkpoint_every=3",
    'data.cleaning=["masks"]',
)
SMALL = {"steps": 4, "shape": (4, 16, 4, 8)}


@pytest.fixture(scope="module")
def undisturbed() -> Outcome:
    return drilled(Drill("gemini", **SMALL))  # type: ignore[arg-type]


@pytest.mark.slow
def test_undisturbed_training_in_units_is_that_of_one_process(undisturbed: Outcome) -> None:
    drill = Drill("gemini", **SMALL)  # type: ignore[arg-type]
    model = model_of(drill)
    weights = dict(model.named_parameters())
    optimizer = make_optimizer(weights, TRAINING)
    for step in range(drill.steps):
        rows = rows_of(drill, step)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            model(input_ids=rows).logits[:, :-1].reshape(-1, 64), rows[:, 1:].reshape(-1)
        )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights.values(), TRAINING.clip_norm)
        optimizer.step()
        assert undisturbed.losses[step] == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, weight in weights.items():
        found = undisturbed.weights[f"weight.{name}"]
        assert float((found - weight.detach()).norm() / weight.detach().norm()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("system", "deaths", "survivors"),
    [
        ("bamboo", ((1, 2, "backward", 1), (2, 0, "forward", 2)), 2),
        ("bamboo", ((2, 3, "apply", 1),), 3),
        ("oobleck", ((1, 1, "exchange", 1), (3, 3, "commit", 1)), 3),
        ("gemini", ((2, 1, "forward", 2),), 3),
        ("gemini", ((3, 2, "apply", 1),), 3),
        ("gemini", ((4, 0, "report", 1),), 3),  # everybody else has done all, and must not be gone yet
    ],
)
def test_whoever_dies_whenever_the_losses_and_weights_are_those_of_an_undisturbed_run(
    undisturbed: Outcome, system: str, deaths: tuple[tuple[int, int, str, int], ...], survivors: int
) -> None:
    ranks = len(deaths) + survivors if system != "gemini" else 4
    found = drilled(Drill(system, deaths=deaths, ranks=ranks, **SMALL))  # type: ignore[arg-type]
    assert sorted(found.losses) == sorted(undisturbed.losses)
    assert found.weights.keys() == undisturbed.weights.keys()
    assert found.apart(undisturbed) < 1e-6
    assert found.survivors == survivors
    assert found.lost_steps <= (1 if system == "gemini" else 0)


@pytest.mark.slow
def test_when_a_stage_and_its_shadow_die_together_the_disk_is_asked(undisturbed: Outcome) -> None:
    deaths = ((3, 1, "commit", 1), (3, 2, "commit", 1))
    found = drilled(Drill("bamboo", deaths=deaths, save_every=2, **SMALL))  # type: ignore[arg-type]
    assert found.apart(undisturbed) < 1e-6
    assert found.survivors == 2
    assert found.lost_steps == 1


@pytest.mark.slow
def test_what_was_computed_ahead_of_a_death_is_not_computed_again() -> None:
    found = drilled(Drill("bamboo", deaths=((2, 2, "backward", 1),), **SMALL))  # type: ignore[arg-type]
    # Ranks 0 and 1 keep their own forward of all four pieces, rank 1 that of its dead successor too.
    assert found.spared >= 12


def _late(connection: Connection) -> None:
    """Keep the others waiting for longer than ranks may take to meet."""
    job = json.loads(connection.recv_bytes())
    line = Line(job["port"], job["member"])
    line.join()
    apart, found = group_of(), torch.ones(1)
    if job["member"]:
        time.sleep(5)
        send(found, 0)
        time.sleep(5)
    else:
        receive(found, 1)
    torch.distributed.all_reduce(found)
    torch.distributed.all_reduce(found, group=apart)
    connection.send_bytes(json.dumps(float(found)).encode())


@pytest.mark.slow
def test_a_rank_that_computes_long_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (membership, waiting):
        monkeypatch.setattr(module, "MEETING", timedelta(seconds=4))
    store = open_store()
    nursery = Nursery(_late)
    children = []
    try:
        children = [nursery.start() for _ in range(2)]
        for member, child in enumerate(children):
            child.connection.send_bytes(json.dumps({"port": store.port, "member": member}).encode())
        announce(store, 0, [0, 1], [0, 1])
        assert [json.loads(child.connection.recv_bytes()) for child in children] == [4.0, 4.0]
    finally:
        for child in children:
            nursery.end(child)
            child.connection.close()
        nursery.close()


def test_a_loss_that_is_no_number_ends_the_run_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drill_rank, "TRAINING", TRAINING.model_copy(update={"learning_rate": 1e30, "clip_norm": 0.0}))
    with pytest.raises(EngineError, match="the loss is not a finite number"):
        drilled(Drill("bamboo", ranks=2, steps=20, pieces=1, shape=(2, 16, 2, 8)))


def test_a_rank_that_was_taken_for_dead_is_fenced_off() -> None:
    store = open_store()
    line = Line(store.port, 1)
    announce(store, 0, [0, 1], [0, 1])
    announce(store, 1, [0], [])
    with pytest.raises(EngineError, match="without rank 1"):
        line.join()


class Interrupted:
    """A launcher's store as members see it whose launcher comes no further than its first word."""

    def __init__(self, store: TCPStore) -> None:
        self.store, self.said = store, 0

    def set(self, key: str, value: str) -> None:
        self.said += 1
        if self.said == 1:
            self.store.set(key, value)


@pytest.mark.timeout(30)
def test_an_epoch_is_announced_whole_or_not_at_all() -> None:
    store = open_store()
    announce(store, 0, [0, 1], [0, 1])
    announce(Interrupted(store), 1, [0], [])  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="epoch 1 goes on without rank 1"):
        Line(store.port, 1, epoch=0).join()


def test_a_unit_on_disk_is_whole_or_not_there(tmp_path: Path) -> None:
    disk = DiskCopies(tmp_path, 2)
    state = {"weight.a": torch.arange(6.0)}
    disk.save(3, 0, state)
    assert disk.versions() == []
    disk.save(3, 1, state)
    assert disk.versions() == [3]
    assert torch.equal(disk.load(3, 1)["weight.a"], state["weight.a"])
    path = next((tmp_path / "00000003").glob("1-*"))
    content = path.read_bytes()
    for cut in (0, 7, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(RunError, match="is damaged"):
            disk.load(3, 1)
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(RunError, match="its hash is another"):
        disk.load(3, 1)


def test_old_units_on_disk_go_once_newer_versions_are_whole(tmp_path: Path) -> None:
    disk = DiskCopies(tmp_path, 2)
    for version in (2, 4, 6):
        for unit in (0, 1) if version != 4 else (0,):
            disk.save(version, unit, {"weight.a": torch.ones(1)})
        disk.prune()
    assert disk.versions() == [2, 6]
    disk.save(8, 0, {})
    disk.save(8, 1, {})
    disk.prune()
    assert disk.versions() == [6, 8]
    assert not (tmp_path / "00000004").exists()


@settings(max_examples=30)
@given(st.binary(max_size=200))
def test_a_copy_in_memory_that_is_no_parcel_is_refused(content: bytes) -> None:
    copies = MemoryCopies((), (), 1)
    copies._versions[1] = [content]
    with pytest.raises(ParcelError):
        copies.versions()


@pytest.mark.slow
def test_a_run_whose_rank_is_killed_from_outside_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    words = ["run", "island", *SHORT, "--nproc", "2", "layout.recovery=bamboo"]
    mycel(*words, "--out", "whole", folder=tmp_path)
    command = [sys.executable, "-m", "mycel", *words, "--out", "torn"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL) as running:
        try:
            ranks: list[psutil.Process] = []
            while not list((tmp_path / "torn/work").glob("units/*")):
                assert running.poll() is None
                with suppress(psutil.NoSuchProcess):
                    if len(ranks) < 2:  # the nursery's children: found before they are needed
                        every = psutil.Process(running.pid).children(recursive=True)
                        parents = {each.ppid() for each in every}
                        ranks = [each for each in every if each.pid not in parents and each.ppid() != running.pid]
                time.sleep(0.01)
            os.kill(max(each.pid for each in ranks), signal.SIGKILL)
            assert running.wait(100) == 0
        finally:
            running.kill()
    whole, torn = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "torn"))
    assert torn["curve"]["losses"] == pytest.approx(whole["curve"]["losses"], rel=1e-6)
    assert torn["final"]["loss"] == pytest.approx(whole["final"]["loss"], rel=1e-6)
    assert len(torn["stayed"]) == 1
    assert len(torn["recoveries"]) == 1
    assert torn["cleaning"] == whole["cleaning"] != {}


def test_a_layout_that_cannot_be_moved_between_ranks_is_refused() -> None:
    with pytest.raises(RecipeError, match="moves whole blocks between ranks: leave it at 1"):
        check_enduring(Layout(tensor=2, recovery="gemini"))
