"""The peer engines keep their contract; forged announcements and strangers come to nothing."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.engines.identity import Authority, verified
from mycel.engines.peers import Peers
from mycel.engines.peers_memory import MemoryPeers, MemorySwarm
from mycel.engines.peers_zenoh import ZenohPeers
from mycel.errors import EngineError
from mycel.fleet.clock import run_virtual
from mycel.testing import check_peers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_twin_in_memory_keeps_the_contract() -> None:
    async def check() -> None:
        swarm = MemorySwarm(latency=0.003, bandwidth=1e9)

        async def stranger(name: str) -> Peers:
            return MemoryPeers(swarm, Authority.new("elsewhere").issue(name))

        await check_peers(swarm.join, stranger)

    run_virtual(check())


@pytest.mark.parametrize("reach", ["127.0.0.1:0", ""], ids=["direct", "outbound-only"])
def test_zenoh_keeps_the_contract(reach: str) -> None:
    async def check() -> None:
        authority = Authority.new("test")
        address = f"127.0.0.1:{free_port()}"
        router = await ZenohPeers.join(authority.issue("router"), "test", listen=address, router=True)

        async def join(name: str) -> Peers:
            return await ZenohPeers.join(authority.issue(name), "test", (address,), reach)

        async def stranger(name: str) -> Peers:
            return await ZenohPeers.join(
                Authority.new("elsewhere").issue(name), "test", (address,), reach or "127.0.0.1:0"
            )

        try:
            await check_peers(join, stranger)
        finally:
            await router.close()

    asyncio.run(check())


def test_announcements_that_are_forged_stale_or_in_anothers_name_are_refused() -> None:
    authority = Authority.new("one")
    member = authority.issue("member")
    frame = member.sign({"blocks": [0, 2]}, 5.0)
    assert verified(frame, authority.certificate).facts == {"blocks": [0, 2]}
    altered = json.loads(frame)
    altered["text"] = altered["text"].replace("[0, 2]", "[0, 9]")
    bad = [
        json.dumps(altered).encode(),
        replace(member, name="other").sign({}, 5.0),
        Authority.new("two").issue("member").sign({}, 5.0),
        member.sign({}, 1e9),
    ]
    for each in bad:
        with pytest.raises(EngineError, match="an announcement"):
            verified(each, authority.certificate)


@pytest.mark.parametrize(("off", "borne"), [(-100, True), (100, True), (-200, False), (200, False)])
def test_clocks_may_differ_by_two_minutes_and_beyond_it_are_named(
    monkeypatch: pytest.MonkeyPatch, off: float, borne: bool
) -> None:
    authority = Authority.new("one")
    frame = authority.issue("member").sign({}, 5.0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + off)
    if borne:
        assert verified(frame, authority.certificate).name == "member"
    else:
        with pytest.raises(EngineError, match="clocks may differ by 120 s"):
            verified(frame, authority.certificate)


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=200)
    | st.dictionaries(st.text(max_size=11), st.text(max_size=9)).map(lambda t: json.dumps(t).encode())
)
def test_bytes_that_are_no_announcement_are_refused(frame: bytes) -> None:
    with pytest.raises(EngineError):
        verified(frame, AUTHORITY)


AUTHORITY = Authority.new("fuzz").certificate


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80))
def test_bytes_that_are_no_frame_are_dropped(frame: bytes) -> None:
    async def arrive() -> None:
        swarm = MemorySwarm()
        member = await swarm.join("one")
        member._arrived(frame)
        member._heard(frame)
        assert not member.members()
        await member.close()

    run_virtual(arrive())


def test_a_member_that_falls_silent_is_gone_when_its_lease_ends() -> None:
    async def check() -> None:
        swarm = MemorySwarm()
        one, two = await swarm.join("one"), await swarm.join("two")
        await two.announce({}, lease=6.0)
        await asyncio.sleep(30)
        assert "two" in one.members()  # renewed while it lives
        assert two._renewal is not None
        two._renewal.cancel()
        await asyncio.sleep(7)
        assert "two" not in one.members()
        await asyncio.gather(one.close(), two.close())

    run_virtual(check())
