"""A party touches what it was handed and nothing else: requests of Flower's own making, and forged ones."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the federation extra is not installed")

from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, Message, Metadata, ObjectTree, PullObjectRequest
from flwr.proto.node_pb2 import Node
from hypothesis import given
from hypothesis import strategies as st

from gated import POLL, Town, call, gate
from mycel.errors import ParcelError
from mycel.guard.handed import ANSWER, CONFIRM, PULL, REMEMBERED, Handed
from mycel.wire.fields import fields, varint

OURS, PART, THEIRS = (hashlib.sha256(word).hexdigest() for word in (b"ours", b"part", b"theirs"))
NODE = Node(node_id=2**63 + 5)
COORDINATOR = 1  # as a message's source: the SuperLink itself


def handing_over() -> bytes:
    tree = ObjectTree(object_id=OURS, children=[ObjectTree(object_id=PART)])
    message = Message(metadata=Metadata(message_id=OURS, src_node_id=COORDINATOR, dst_node_id=NODE.node_id, ttl=60.0))
    whole: bytes = PullMessagesResponse(messages_list=[message], message_object_trees=[tree]).SerializeToString()
    return whole


def reply(to: str, messages: int = 1, source: int = NODE.node_id) -> bytes:
    metadata = Metadata(message_id=THEIRS, src_node_id=source, dst_node_id=COORDINATOR, reply_to_message_id=to, ttl=1.0)
    trees = [ObjectTree(object_id=THEIRS)]
    request = PushMessagesRequest(
        node=NODE, messages_list=[Message(metadata=metadata)] * messages, message_object_trees=trees
    )
    whole: bytes = request.SerializeToString()
    return whole


def pull(name: str) -> bytes:
    whole: bytes = PullObjectRequest(node=NODE, run_id=2**63 + 1, object_id=name).SerializeToString()
    return whole


def confirm(name: str) -> bytes:
    whole: bytes = ConfirmMessageReceivedRequest(node=NODE, run_id=7, message_object_id=name).SerializeToString()
    return whole


def test_what_was_handed_over_passes_and_nothing_else() -> None:
    handed = Handed()
    assert handed.objection(PULL, pull(OURS)) == "the object is another's"
    handed.note(handing_over())
    for path, request in ((PULL, pull(OURS)), (PULL, pull(PART)), (CONFIRM, confirm(OURS)), (ANSWER, reply(OURS))):
        assert handed.objection(path, request) == ""
    assert handed.objection(PULL, pull(THEIRS)) == "the object is another's"
    assert handed.objection(CONFIRM, confirm(THEIRS)) == "the object is another's"
    assert handed.objection(ANSWER, reply(THEIRS)) == "the answer is to no message of this party's"


def test_a_forger_finds_no_second_reading() -> None:
    """Protobuf's readers merge what is there twice, and pass over what they do not know: such requests are refused."""
    handed = Handed()
    handed.note(handing_over())
    for path, request in (
        (PULL, pull(OURS) + pull(THEIRS)),
        (PULL, pull(OURS) + b"\x18\x01"),  # the same field once more, as a number
        (PULL, pull("")),
        (ANSWER, reply("", source=COORDINATOR)),  # a message of the SuperLink's own, to another party
        (ANSWER, reply(OURS, messages=2)),
        (ANSWER, reply(OURS) + reply("")),
        (ANSWER, b""),
        (CONFIRM, b"\xff"),
    ):
        assert handed.objection(path, request) == "the request is not laid out as a node's", request


def test_only_so_many_names_are_remembered_the_latest() -> None:
    handed = Handed()
    for number in range(REMEMBERED + 10):
        handed.note(hashlib.sha256(str(number).encode()).hexdigest().encode())
    handed.note(handing_over())
    assert len(handed.names) == REMEMBERED
    assert not handed.objection(PULL, pull(OURS))


@given(content=st.binary(max_size=60))
def test_whatever_comes_is_read_or_refused(content: bytes) -> None:
    try:
        found = fields(content)
    except ParcelError:
        return
    assert sum(len(values) for values in found.values()) <= len(content)


@given(number=st.integers(0, 2**64 - 1), text=st.text(max_size=20))
def test_fields_are_read_as_flowers_library_writes_them(number: int, text: str) -> None:
    found = fields(Metadata(run_id=number, group_id=text, ttl=2.5).SerializeToString())
    assert found.get(1, [0]) == [number]
    assert found.get(6, [b""]) == [text.encode()]
    assert fields(b"\x08" + varint(number)) == {1: [number]}


def test_a_gate_lets_nobody_at_anothers_message(tmp_path: Path) -> None:
    town = Town(tmp_path)
    clinic, institute = ((town.context(town.file(name)), town.key(name)) for name in ("clinic", "institute"))

    async def program() -> None:
        async with gate(town.policy, town.server) as (target, port, relay):
            target.message = handing_over()
            requests = ((PULL, pull(PART)), (ANSWER, reply(OURS)), (CONFIRM, confirm(OURS)))
            assert (await asyncio.to_thread(call, port, POLL, *clinic, "poll"))[1] == target.message
            before = len(target.reached)
            for path, body in requests:
                assert (await asyncio.to_thread(call, port, path, *institute, f"i{path}", body))[0] == 403
            assert len(target.reached) == before  # not one byte of them passed
            for path, body in requests:
                assert (await asyncio.to_thread(call, port, path, *clinic, f"c{path}", body))[0] == 200
            assert sum(relay.refused.values()) == 3

    asyncio.run(program())
