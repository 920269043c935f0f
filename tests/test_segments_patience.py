"""Deadlines and bans follow what a peer did; only patience is set by hand."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoders import decoder
from mycel.segments.patience import LONGEST, Patience
from swarms import bench
from test_segments import COUNT, PROMPTS, greedy, together


def steady(seconds: float, answers: int, positions: int = 1) -> Patience:
    found = Patience()
    for _ in range(answers):
        found.learn(positions, seconds)
    return found


@given(st.floats(1e-4, 10.0), st.floats(0.5, 300.0))
def test_a_deadline_keeps_no_floor_but_what_the_peer_needs(seconds: float, patience: float) -> None:
    assert Patience().allowance(1, patience) == steady(seconds, 2).allowance(1, patience) == patience
    allowed = [steady(seconds, answers).allowance(1, patience) for answers in (3, 10, 100, 1000)]
    assert allowed == sorted(allowed, reverse=True)
    assert seconds < allowed[-1] <= 3 * seconds + 2e-6 * patience + 1e-9
    assert steady(10 * seconds, 1000).allowance(1, 0.0) == pytest.approx(10 * steady(seconds, 1000).allowance(1, 0.0))


def test_it_grows_with_the_work_and_with_delays_that_were_seen_and_forgets_them() -> None:
    usual = steady(0.01, 200)
    short = usual.allowance(1, 0.0)
    assert usual.allowance(8 * 9 + 64, 0.0) == pytest.approx(16 * short)
    usual.learn(1, 0.5)
    assert usual.allowance(1, 0.0) > 0.5
    for _ in range(1000):
        usual.learn(1, 0.01)
    assert usual.allowance(1, 0.0) == pytest.approx(short, rel=1e-2)


@pytest.mark.parametrize("waited", [0.02, 2.0])
def test_who_is_late_is_left_alone_for_what_it_cost_twice_as_long_each_time(waited: float) -> None:
    found, patience = steady(0.01, 200), 30.0
    bans = []
    for _ in range(LONGEST + 3):
        found.late(100.0, waited, patience)
        bans.append(found.banned_until - 100.0)
        assert found.allowance(1, patience) > waited, "the same delay is not taken for a loss again"
    assert bans[:3] == pytest.approx([waited, 2 * waited, 4 * waited])
    assert bans[-1] == bans[-2] == pytest.approx(2**LONGEST * waited)
    found.learn(1, 0.01)
    found.late(0.0, 1e6, patience)
    assert found.banned_until == patience, "a ban begins with no more than patience"
    found.learn(1, 0.01)
    found.lied(0.0, patience)
    assert found.banned_until == patience


def test_a_silent_peer_costs_what_was_learnt_and_not_patience(tmp_path: Path) -> None:
    decoder("llama").save_pretrained(tmp_path)

    async def check() -> None:
        async with bench(tmp_path, [(0, 4), (0, 4)], patience=1e3) as made:
            wanted = [greedy(tmp_path, prompt, 2 * COUNT) for prompt in PROMPTS]
            for host in made.hosts:
                await made.model.peers.call(host.peers.name, "echo", b"", 5.0)
            for _ in range(400):  # experience, so that patience counts for little
                for host in made.hosts:
                    made.model.directory.known[host.peers.name].learn(1, 1e-3)
            made.hosts[0].peers.serve(_never)
            made.hosts[1].peers.serve(made.hosts[1].answer)
            assert await together(made.model, PROMPTS, 2 * COUNT) == wanted

    asyncio.run(check())


async def _never(sender: str, verb: str, frame: bytes) -> bytes:
    await asyncio.Event().wait()
    return b""
