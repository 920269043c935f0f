"""Real processes on loopback with mutual TLS: killed, stopped and lying peers, and the command line around them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from decoders import decoder
from mycel.cli.demo_swarm import loopback_swarm, present
from mycel.engines.peers_memory import MemorySwarm
from mycel.errors import EngineError
from mycel.segments.client import SwarmModel, Turn
from mycel.segments.lender import RESERVE, Lender, parse_blocks, parse_memory, room, weigh
from mycel.segments.session import Session
from mycel.segments.swarm import Swarm, address
from test_segments import PROMPTS, greedy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    decoder("llama").save_pretrained(place)
    return place


def test_a_stopped_and_a_killed_peer_change_no_token(folder: Path) -> None:
    count = 24

    async def check() -> None:
        # Outbound-only peers: every frame passes through the door.
        async with loopback_swarm(folder, 2, ("0:4", "0:4"), reach="") as (door, processes):
            model = await SwarmModel.open(door, folder, patience=120.0)  # of a busy machine's seconds nobody is lost
            sessions, new = [Session() for _ in PROMPTS], PROMPTS
            found, victims = [list[int]() for _ in PROMPTS], list[str]()
            try:
                await present(door, 2, processes)
                for step in range(count):
                    if step == 8:  # stopped: nothing but the learnt deadline tells
                        victims.append(sessions[0].hops[0].leg.peer)
                        os.kill(processes[victims[0]].pid, signal.SIGSTOP)
                    if step == 16:  # killed: its connection tells at once; the stopped one wakes up and serves again
                        victims.append(sessions[0].hops[0].leg.peer)
                        processes[victims[1]].kill()
                        os.kill(processes[victims[0]].pid, signal.SIGCONT)
                    logits = await model.step([Turn(s, t) for s, t in zip(sessions, new, strict=True)])
                    new = [[int(row)] for row in logits.argmax(-1)]
                    for tokens, more in zip(found, new, strict=True):
                        tokens += more
                assert found == [greedy(folder, prompt, count) for prompt in PROMPTS]
                assert len(set(victims)) == 2
                assert len(model.pauses) == 2
                await model.forget(sessions)
            finally:
                for name in victims[:1]:
                    os.kill(processes[name].pid, signal.SIGCONT)
                await model.close()

    asyncio.run(check())


def test_the_demo_survives_a_killed_peer_and_leaves_nothing_behind(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": "src"}
    before = {process.pid for process in psutil.process_iter()}
    done = subprocess.run(
        [sys.executable, "-m", "mycel", "demo", "swarm", "--model", "micro", "--json"],
        env=environment, capture_output=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    assert found["identical_tokens"] is True
    assert found["peers"] == 4
    assert 0 < found["pause_seconds"] < 60
    left = [p for p in psutil.process_iter() if p.pid not in before and "--join" in " ".join(_line(p))]
    assert not left


def _line(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def test_lenders_fill_the_gap_and_one_moves_when_a_peer_leaves(folder: Path) -> None:
    async def check() -> None:
        swarm = MemorySwarm()
        _, block = weigh(folder)
        lenders, members = [], []
        try:
            for name in ("one", "two", "three"):
                members.append(await swarm.join(name))
                lenders.append(Lender(members[-1], folder, RESERVE + int(3.2 * block)))
                await lenders[-1].start(period=3600, settle=0.01)
            held = [_blocks(lender) for lender in lenders]
            assert sorted(held[:2]) == [(0, 2), (2, 4)]
            alone = next(index for index in (0, 1) if held[index] != held[2])
            members[alone].kill()
            await asyncio.sleep(0.05)
            others = [lender for index, lender in enumerate(lenders) if index != alone]
            assert sum([await lender.reconsider() for lender in others]) == 1
            assert {_blocks(lender) for lender in others} == {(0, 2), (2, 4)}
        finally:
            for lender, member in zip(lenders, members, strict=True):
                await lender.close()
                await member.close()

    asyncio.run(check())


def _blocks(lender: Lender) -> tuple[int, int]:
    assert lender.host is not None
    return lender.host.segment.first, lender.host.segment.last


def test_bad_words_on_the_command_line_are_refused(tmp_path: Path, folder: Path) -> None:
    assert parse_memory("4GiB") == 4 << 30
    assert parse_memory("500 MB") == 500_000_000
    assert parse_memory("") == 0
    assert parse_blocks("auto") is None
    assert parse_blocks("2:4") == (2, 4)
    for text, parse in (("much", parse_memory), ("4 GiBs", parse_memory), ("4:2", parse_blocks), ("all", parse_blocks)):
        with pytest.raises(EngineError, match="needed"):
            parse(text)
    with pytest.raises(EngineError, match="host:port"):
        address("localhost")
    with pytest.raises(EngineError, match="no swarm's folder"):
        Swarm.load(tmp_path)
    with pytest.raises(EngineError, match="holds no block"):
        room(RESERVE + 10, 1000, 4)
    swarm = Swarm.create(tmp_path / "ours", "127.0.0.1:7447")
    with pytest.raises(EngineError, match="not empty"):
        Swarm.create(tmp_path / "ours", "127.0.0.1:7447")
    invited = Swarm.load(swarm.invite("laptop"))
    assert invited.identity().name == "laptop"
    assert not (invited.folder / "authority.key").exists()
    assert (invited.folder / "member.key").stat().st_mode & 0o077 == 0
