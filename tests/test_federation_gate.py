"""Keys, and the gates that stand between parties and the SuperLink: real sockets, real TLS, a stand-in behind them."""

from __future__ import annotations

import asyncio
import base64
import http.client
import socket
import ssl
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="the federation extra is not installed")

from gated import APP, POLL, PUSH, Target, Town, call, gate
from mycel.errors import RunError
from mycel.federation.keyring import Keyring
from mycel.guard.freshness import TOLERANCE, Signatures
from mycel.guard.gates import BETWEEN, REQUEST, OpenGate, PartyGate
from mycel.guard.keys import Identity, issue, make_authority, pem, spki
from mycel.wire.relay import Relay


@pytest.fixture
def town(tmp_path: Path) -> Town:
    return Town(tmp_path)


def test_keys_are_their_owners_alone_and_never_overwritten(town: Town) -> None:
    for path in (*(town.folder / "keys").glob("*.pem"), town.file("clinic")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((town.folder / "keys").stat().st_mode) == 0o700
    with pytest.raises(RunError, match="never overwritten"):
        Keyring.make(town.folder / "keys", ["127.0.0.1"], [])
    with pytest.raises(RunError, match="there is a party 'clinic' already"):
        town.ring.add("clinic")
    with pytest.raises(RunError, match="cannot be called"):
        town.ring.add("../clinic")
    town.file("clinic").chmod(0o644)
    with pytest.raises(RunError, match="chmod 600"):
        Identity.load(town.file("clinic"))


def test_a_bundle_whose_parts_do_not_belong_together_is_refused(town: Town, tmp_path: Path) -> None:
    stranger = issue(make_authority("other"), "clinic")
    mixed = Identity(stranger.key, town.identities["clinic"].certificate, town.identities["clinic"].authority)
    mixed.save(tmp_path / "mixed.pem")
    with pytest.raises(RunError, match="do not belong together"):
        Identity.load(tmp_path / "mixed.pem")
    (tmp_path / "stranger.crt").write_bytes(pem(stranger.certificate))
    with pytest.raises(RunError, match="not issued by this federation"):
        town.ring.admit(tmp_path / "stranger.crt")


def test_admission_keeps_its_order_and_forgets_the_revoked(town: Town) -> None:
    town.ring.add("abbey")
    assert list(town.ring.parties()) == ["clinic", "institute", "abbey"]
    town.ring.revoke("clinic")
    town.ring.add("clinic-2")
    assert list(town.ring.parties()) == ["institute", "abbey", "clinic-2"]
    with pytest.raises(RunError, match="no admitted party"):
        town.ring.revoke("clinic")


def _through(town: Town, *calls: Callable[[int], tuple[int, bytes]]) -> tuple[list[tuple[int, bytes]], Target, Relay]:
    async def program() -> tuple[list[tuple[int, bytes]], Target, Relay]:
        async with gate(town.policy, town.server) as (target, port, relay):
            return [await asyncio.to_thread(call, port) for call in calls], target, relay

    return asyncio.run(program())


def test_an_admitted_party_passes_and_is_counted_by_the_kernel(town: Town) -> None:
    context, key, size = town.context(town.file("clinic")), town.key("clinic"), 1 << 20
    answers, target, _ = _through(
        town,
        lambda port: call(port, PUSH, context, key, "a", bytes(size)),
        lambda port: call(port, POLL, context, key, "b"),
    )
    assert answers == [(200, b"answer"), (200, b"answer")]
    assert target.reached == [(PUSH, size), (POLL, 1)]
    received = sum(town.policy.traffic["clinic"].received.values())
    assert size < received < 1.02 * size


def test_strangers_stay_out(town: Town, tmp_path: Path) -> None:
    outsider = issue(make_authority("other"), "clinic")
    outsider.save(tmp_path / "outsider.pem")
    root = Identity.load(town.folder / "keys" / "authority.pem")
    issue(root, "clinic", days=-1).save(tmp_path / "expired.pem")
    unknown = issue(root, "newcomer")  # signed, but never admitted
    unknown.save(tmp_path / "unknown.pem")
    key = spki(unknown.key.public_key())

    def refused_by_tls(bundle: Path | None) -> Callable[[int], tuple[int, bytes]]:
        def attempt(port: int) -> tuple[int, bytes]:
            with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
                call(port, POLL, town.context(bundle), key)
            return 0, b""

        return attempt

    def plain(port: int) -> tuple[int, bytes]:
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            call(port, POLL, None, key)
        return 0, b""

    answers, target, relay = _through(
        town,
        plain,
        refused_by_tls(None),
        refused_by_tls(tmp_path / "outsider.pem"),
        refused_by_tls(tmp_path / "expired.pem"),
        lambda port: call(port, POLL, town.context(tmp_path / "unknown.pem"), key),
    )
    assert answers[-1] == (403, b"the certificate's key is not, or no longer, admitted")
    assert sum(relay.refused.values()) == 1
    assert not target.reached


def test_a_revoked_key_is_refused_from_that_moment(town: Town) -> None:
    context, key = town.context(town.file("clinic")), town.key("clinic")

    def after(port: int) -> tuple[int, bytes]:
        town.ring.revoke("clinic")
        return call(port, POLL, context, key, "two")

    answers, target, _ = _through(town, lambda port: call(port, POLL, context, key, "one"), after)
    assert [status for status, _ in answers] == [200, 403]
    assert len(target.reached) == 1


def test_a_replayed_request_another_ones_key_and_the_control_interface_are_refused(town: Town) -> None:
    context, key, other = town.context(town.file("clinic")), town.key("clinic"), town.key("institute")
    answers, target, relay = _through(
        town,
        lambda port: call(port, POLL, context, key, "one"),
        lambda port: call(port, POLL, context, key, "one"),
        lambda port: call(port, POLL, context, key, ""),
        lambda port: call(port, POLL, context, other, "two"),
        lambda port: call(port, "/v1/control/start-run", context, key, "three"),
        lambda port: call(port, "/v1/runtime/get-nodes", context, key, "four"),
        lambda port: call(port, "/v1/fleet/register-node", context, key, "five"),
    )
    assert [status for status, _ in answers] == [200, *[403] * 6]
    assert target.reached == [(POLL, 1)]
    assert sum(relay.refused.values()) == 6


def test_a_signature_is_remembered_as_long_as_it_would_be_taken() -> None:
    known = Signatures()
    assert not known.objection("one", 0.0)
    assert known.objection("one", TOLERANCE) == "the request was sent before"
    assert not known.objection("one", 2 * TOLERANCE + 1)
    assert len(known.seen) == 1


def test_a_clock_that_is_off_is_named_as_the_reason(town: Town) -> None:
    context, key = town.context(town.file("clinic")), town.key("clinic")

    def at(seconds: float) -> Callable[[int], tuple[int, bytes]]:
        moment = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
        return lambda port: call(port, POLL, context, key, f"at {seconds}", timestamp=moment)

    answers, _, relay = _through(town, at(0), at(-200), at(-400), at(60), at(4))
    assert [status for status, _ in answers] == [200, 200, 403, 403, 200]
    assert b"the party's clock is more than 280 s behind the coordinator's" in answers[2][1]
    assert b"the party's clock is more than 5 s ahead of the coordinator's" in answers[3][1]
    assert len(relay.refused) == 2


def test_floods_are_refused_before_they_are_read(town: Town) -> None:
    context, key = town.context(town.file("clinic")), town.key("clinic")
    size = 7 << 20
    whole = -(-BETWEEN // size)  # the request with which a message's bytes are used up

    def too_long(port: int) -> tuple[int, bytes]:
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)
        headers = {"content-length": str(REQUEST + 1), "flwr-signature": "long"}
        connection.putrequest("POST", PUSH)
        for name, value in {**headers, "flwr-public-key": base64.b64encode(key).decode()}.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    floods = [lambda port, n=n: call(port, PUSH, context, key, f"n{n}", bytes(size)) for n in range(whole - 1)]
    answers, target, _ = _through(town, too_long, *floods)
    assert answers[0] == (403, b"the request is too long")
    assert all(status == 200 for status, _ in answers[1:])
    assert sum(length for _, length in target.reached) < BETWEEN

    def last(port: int) -> tuple[int, bytes]:
        try:
            return call(port, PUSH, context, key, "last", bytes(size))
        except OSError:  # refused while it was still being sent
            return 403, b""

    answers, target, relay = _through(town, last)
    assert answers[0][0] == 403
    assert relay.refused == {"more bytes than a message holds": 1}
    assert not target.reached


def test_a_poll_waits_at_the_gate_until_there_is_something() -> None:
    async def program() -> None:
        async with gate(OpenGate()) as (target, port, _):
            target.empty_polls = 5
            answer = await asyncio.to_thread(call, port, POLL, None)
            assert answer == (200, b"answer")
            assert len(target.reached) == 6

    asyncio.run(program())


def test_a_party_lets_no_other_app_in() -> None:
    async def program() -> None:
        async with gate(PartyGate(b"our own app")) as (target, port, relay):
            target.app = b"\x0a\x0b" + b"our own app" + b"hash"
            assert (await asyncio.to_thread(call, port, APP, None))[0] == 200
            target.app = b"\x0a\x0b" + b"another app" + b"hash"
            assert (await asyncio.to_thread(call, port, APP, None))[0] == 502
            target.app = b"our own app" + bytes(2000)
            assert (await asyncio.to_thread(call, port, APP, None))[0] == 502
            assert (await asyncio.to_thread(call, port, "/v1/control/start-run", None))[0] == 403
            assert sum(relay.refused.values()) == 3

    asyncio.run(program())


def test_why_the_coordinator_refuses_stands_in_the_partys_log_once(
    town: Town, caplog: pytest.LogCaptureFixture
) -> None:
    moment = (datetime.now(UTC) - timedelta(hours=1)).isoformat()

    async def program() -> None:
        async with gate(town.policy, town.server) as (_, port, _):
            relay = Relay(("127.0.0.1", port), PartyGate(b""), None, town.context(town.file("clinic")))
            door = await relay.start("127.0.0.1", 0)
            own = door.sockets[0].getsockname()[1]
            for sign in "abc":
                await asyncio.to_thread(call, own, POLL, None, town.key("clinic"), sign, timestamp=moment)
            door.close()
            await relay.close()

    asyncio.run(program())
    (said,) = [record.getMessage() for record in caplog.records if record.name == "mycel.party"]
    assert "the coordinator refuses: the party's clock is more than 280 s behind" in said


def test_a_caller_cut_off_in_the_middle_of_anything_harms_nobody_else() -> None:
    head = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n" % PUSH.encode()
    whole = head + bytes(1000)

    def cut(port: int, length: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as caller:
            caller.sendall(whole[:length])

    async def program() -> None:
        async with gate(OpenGate()) as (target, port, relay):
            for length in (0, 1, 10, len(head), len(head) + 1, len(whole) - 1, len(whole)):
                await asyncio.to_thread(cut, port, length)
            assert await asyncio.to_thread(call, port, PUSH, None) == (200, b"answer")
            assert (PUSH, 1) in target.reached
            while relay._tasks:
                await asyncio.sleep(0.01)

    asyncio.run(program())
