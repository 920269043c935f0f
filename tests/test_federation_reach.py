"""How an operator elsewhere reaches a coordinator: what a silent or a short absence costs, and what it does not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="the federation extra is not installed")

from mycel.errors import RunError
from mycel.federation.desk import STANDING, STATUS
from mycel.federation.keyring import Keyring
from mycel.federation.reach import Elsewhere
from mycel.guard.gates import server_context
from mycel.rounds.deadline import Wait, allowance
from thin_line import serving

DROP, SILENT, WELL = "drop", "silent", "well"


class Desk:
    """A coordinator's desk that has its moods: how it takes each request in turn, and then always the last way."""

    def __init__(self, moods: list[str]) -> None:
        self.moods = moods
        self.heard: list[tuple[str, bytes]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            body = await reader.readexactly(length)
            mood = self.moods.pop(0) if len(self.moods) > 1 else self.moods[0]
            self.heard.append((head.split()[1].decode(), body))
            if mood == SILENT:
                await reader.read()  # until the caller hangs up
            elif mood == WELL:
                said = json.dumps({"seats": {"clinic": 7}}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(said) + said)
                await writer.drain()
        writer.close()


@contextmanager
def elsewhere(folder: Path, moods: list[str]) -> Iterator[tuple[Elsewhere, Desk]]:
    ring = Keyring.make(folder / "keys", ["127.0.0.1"], ["clinic"])
    key, desk = ring.add_operator("anna"), Desk(moods)
    with serving(
        desk.serve, server_context(folder / "keys" / "coordinator.pem", folder / "keys" / "authority.crt")
    ) as port:
        yield Elsewhere(f"127.0.0.1:{port}", key), desk


def test_a_question_that_nobody_answers_is_asked_again_once_it_is_known_how_long_answers_take(tmp_path: Path) -> None:
    with elsewhere(tmp_path, [WELL, SILENT, SILENT, WELL]) as (far, desk):
        assert far.seats() == far.seats() == {"clinic": 7}
        assert desk.moods == [WELL]  # both silences were met, and asked past
        assert len(desk.heard) >= 4  # where a machine is busy a good answer may come late too, and is asked for again
        assert {path for path, _ in desk.heard} == {STATUS}


def test_a_coordinator_that_stays_silent_is_given_up(tmp_path: Path) -> None:
    with elsewhere(tmp_path, [WELL, SILENT]) as (far, _):
        far.overview()
        far._wait.taken.extend([1e-4] * 16)  # a quick one, so that so many doublings pass quickly here
        with pytest.raises(RunError, match="nobody can be reached"):
            far.overview()


@pytest.mark.parametrize("mood", [DROP, SILENT])
def test_news_that_does_not_pass_ends_no_other_news(tmp_path: Path, mood: str) -> None:
    with elsewhere(tmp_path, [WELL, mood, WELL]) as (far, desk):
        far.overview()
        for number in range(3):
            far.tell({"round": number})
            while not any(body == json.dumps({"round": number}).encode() for _, body in desk.heard):
                assert far._teller is not None
                far._teller.join(0.01)
                assert far._teller.is_alive()
        far.close()
        assert desk.heard[-1] == (STANDING, b'{"round": 2}')
        assert not far._teller or not far._teller.is_alive()


def test_a_wait_is_learnt_as_a_partys_deadline_is() -> None:
    assert Wait(patience=3.0).seconds is None
    wait = Wait(patience=3.0)
    for seconds in (1.0, 2.0, 4.0):
        wait.learn(seconds)
    assert wait.seconds == pytest.approx(2.0 + 3.0 * (1 + 4 / 3) * 1.0)
    wait.lost()
    assert wait.seconds == 2 * allowance([1.0, 2.0, 4.0], 3.0, 1 + 4 / 3, 0)
    wait.learn(2.0)
    assert wait.silent == 0
