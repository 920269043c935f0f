"""A node that runs on and does nothing is noticed, and one that waits for its party's work is left alone."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the federation extra is not installed")

from mycel.engines import children
from mycel.engines.flower import launch
from mycel.engines.line import Control
from mycel.federation import pulse, seat
from mycel.federation.pulse import SILENT, Pulse
from mycel.federation.seat import Seat
from mycel.guard.gates import HEARTBEAT, POLL
from mycel.guard.handed import ANSWER
from mycel.testing.engines import Echo


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_node_lives_while_it_beats_and_does_something() -> None:
    clock = Clock()
    found = Pulse(clock)
    for _ in range(10):
        clock.now += 0.9 * SILENT
        found.heard(HEARTBEAT)
        found.heard(POLL)
        assert not found.stopped()


@pytest.mark.parametrize(("still", "said"), [(HEARTBEAT, "asks for messages"), (POLL, "heartbeats")])
def test_a_node_that_does_half_of_what_it_should_has_stopped(still: str, said: str) -> None:
    clock = Clock()
    found = Pulse(clock)
    for _ in range(3):
        clock.now += 0.5 * SILENT
        found.heard(still)
    assert said in found.stopped()
    found.started()
    assert not found.stopped()


def test_a_node_that_waits_for_long_work_is_left_alone() -> None:
    clock = Clock()
    found = Pulse(clock)

    def work(control: Control, frame: bytes) -> tuple[Control, bytes]:
        for _ in range(20):
            clock.now += 0.9 * SILENT
            found.heard(HEARTBEAT)
            assert not found.stopped()
        return control, frame

    assert found.around(work)({"verb": "ask"}, b"brief") == ({"verb": "ask"}, b"brief")
    clock.now += 0.9 * SILENT
    assert "heartbeats" not in found.stopped()
    clock.now += 0.2 * SILENT
    assert found.stopped()


def test_a_node_that_asks_for_more_while_it_owes_an_answer_lags() -> None:
    found = Pulse(Clock())
    reply = found.around(lambda control, frame: (control, frame))
    for _ in range(3):  # one message after another, each answered before the next is asked for
        found.heard(POLL)
        found.handed()
        reply({}, b"")
        found.heard(ANSWER)
        assert not found.stopped()
    found.heard(POLL)
    found.handed()  # a message whose parts never come, and which is handed over again
    found.heard(POLL)
    found.handed()
    reply({}, b"")
    found.heard(ANSWER)
    assert not found.stopped()
    reply({}, b"")  # for a run that has ended in the middle of its message
    assert not found.stopped()
    found.heard(POLL)
    assert found.stopped() == "is an answer behind"
    found.started()
    assert not found.stopped()


def test_a_node_that_answers_for_another_message_than_it_was_handed_lags() -> None:
    found = Pulse(Clock())
    found.heard(POLL)
    found.handed()
    found.heard(ANSWER)  # of a run that has ended, in this one's turn
    assert found.stopped() == "is an answer behind"


class Silent(Echo):
    def describe(self, arm: str, job: str, node: int) -> Control:
        raise AssertionError("nobody asks")


def test_a_party_starts_a_node_again_that_runs_on_and_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYCEL_STATE", str(tmp_path))
    monkeypatch.setattr(pulse, "SILENT", 0.3)
    monkeypatch.setattr(seat, "SOONEST", 0.01)
    started: list[subprocess.Popen[bytes]] = []

    def sleeper(*_: Any) -> subprocess.Popen[bytes]:
        started.append(children.start(["sleep", "60"], {}, tmp_path / "words"))
        return started[-1]

    monkeypatch.setattr(launch, "supernode", sleeper)

    async def program() -> None:
        serving = asyncio.ensure_future(Seat("127.0.0.1:9", "party", None, Silent()).run())
        while len(started) < 3:
            await asyncio.sleep(0.05)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)

    asyncio.run(program())
    assert all(process.poll() is not None for process in started)
