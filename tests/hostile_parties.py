"""Parties with valid keys and bad intentions: one that asks for another's messages, one whose answers are poison."""

from __future__ import annotations

import asyncio
import base64
import http.client
import itertools
import json
import os
import signal
import sqlite3
import ssl
import struct
import sys
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import zstandard
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, Message, Metadata, ObjectTree, PullObjectRequest
from flwr.proto.node_pb2 import Node

from mycel.engines.line import Control, listen, serve
from mycel.federation.demo import Village
from mycel.federation.seat import Seat
from mycel.guard.gates import POLL, client_context
from mycel.guard.handed import ANSWER, CONFIRM, PULL
from mycel.guard.keys import Identity, spki
from villages import go


def frame_of(codec: str, shape: list[int], parts: dict[str, bytes]) -> bytes:
    """A frame of one tensor, laid out by hand."""
    about = {"shapes": {"update/x": shape}, "codec": codec, "kind": "answer"}
    listing: dict[str, Any] = {"__metadata__": {"mycel": json.dumps(about)}}
    body = b""
    for name, part in parts.items():
        listing[f"update/x|{name}"] = {
            "dtype": "U8",
            "shape": [len(part)],
            "data_offsets": [len(body), len(body) + len(part)],
        }
        body += part
    head = json.dumps(listing).encode()
    return struct.pack("<Q", len(head)) + head + body


CLAIMED = frame_of("int8", [1 << 39], {})  # half a terabyte, unpacked
FOLDED = frame_of("zstd", [1000], {"values": zstandard.ZstdCompressor().compress(bytes(1 << 29))})
ANSWERS: list[tuple[Any, bytes]] = [
    ({"total": 100, "seconds": 0.0}, bytes(1 << 24)),  # brings more than it says
    ({"total": 1 << 40, "seconds": 0.0}, bytes(1 << 20)),  # says that it has a terabyte
    ({"total": len(CLAIMED), "seconds": 0.0}, CLAIMED),
    ({"total": len(FOLDED), "seconds": 0.0}, FOLDED),
]


@dataclass
class Thief:
    """Whoever holds a party's key and speaks to the coordinator without a node."""

    village: Village
    name: str

    def __post_init__(self) -> None:
        host, _, port = self.village.address.rpartition(":")
        self.gate = host, int(port)
        self.key = Identity.load(self.village.folder / "keys" / "parties" / f"{self.name}.pem").key
        home = self.village.folder / "state" / "coordinators" / self.village.address.replace(":", "_")
        self.database = home / "superlink.sqlite"
        self.post: dict[str, Any] = json.loads((home / "coordinator.json").read_text())

    def ask(self, path: str, request: bytes, past_the_gate: bool = False) -> tuple[int, bytes]:
        """Make a request as a node makes it; on the coordinator's own machine, past its gate too."""
        keys = self.village.folder / "keys"
        context = client_context(keys / "authority.crt", keys / "parties" / f"{self.name}.pem")
        address = self.gate
        if past_the_gate:
            context = client_context(Path(self.post["line"]).parent / "inner" / "authority.crt")
            address = "127.0.0.1", self._superlink()
        call = http.client.HTTPSConnection(*address, context=context, timeout=60)
        try:
            call.request("POST", path, request, self._headers())
            answer = call.getresponse()
            return answer.status, answer.read()
        except ssl.SSLError as error:
            return 0, str(error).encode()
        finally:
            call.close()

    def _headers(self) -> dict[str, str]:
        moment = datetime.now(UTC).isoformat()
        signature = self.key.sign(moment.encode(), ec.ECDSA(hashes.SHA256()))
        return {
            "content-type": "application/protobuf",
            "flwr-public-key": base64.b64encode(spki(self.key.public_key())).decode(),
            "flwr-timestamp": moment,
            "flwr-signature": base64.b64encode(signature).decode(),
        }

    def _superlink(self) -> int:
        words = next(
            child.cmdline() for child in psutil.Process(self.post["pid"]).children() if "--database" in child.cmdline()
        )
        return int(words[words.index("--port") + 1])

    def pulling(self, node: str, run: int, name: str) -> bytes:
        """A request for an object, in the name of a node."""
        whole: bytes = PullObjectRequest(node=self._node(node), run_id=run, object_id=name).SerializeToString()
        return whole

    def wishes(self, message: str, run: int, part: str) -> dict[str, tuple[str, bytes]]:
        """What may be asked about party-1's message and its part."""
        own, other = self._node(self.name), self._node("party-1")
        forged: dict[str, Any] = {
            "run_id": run,
            "message_id": "f" * 64,
            "ttl": 99.0,
            "message_type": "query",
            "created_at": time.time(),
        }
        question = Metadata(src_node_id=1, dst_node_id=other.node_id, **forged)  # as if from the SuperLink
        reply = Metadata(src_node_id=other.node_id, dst_node_id=1, reply_to_message_id=message, **forged)
        removal = ConfirmMessageReceivedRequest(node=own, run_id=run, message_object_id=message)
        return {
            "its next message": (POLL, PullMessagesRequest(node=other).SerializeToString()),
            "the message": (PULL, self.pulling(self.name, run, message)),
            "a part of it": (PULL, self.pulling(self.name, run, part)),
            "a part, in its name": (PULL, self.pulling("party-1", run, part)),
            "to remove it": (CONFIRM, removal.SerializeToString()),
            "to answer it": (ANSWER, _bringing(own, reply)),
            "to ask it something": (ANSWER, _bringing(own, question)),
        }

    def _node(self, party: str) -> Node:
        return Node(node_id=self.post["seats"][party])

    def online(self, party: str) -> bool:
        """Whether the SuperLink has heard of a party's node."""
        return self._look("select status from node where node_id = ?", self._signed(party)) == [("online",)]

    def messages_of(self, party: str) -> list[tuple[str, int]]:
        """What the SuperLink keeps for a party, looked up behind its back: names of messages, and their runs."""
        query = "select message_id, run_id from message_ins where dst_node_id = ? order by created_at desc"
        return [(name, run % (1 << 64)) for name, run in self._look(query, self._signed(party))]

    def parts_of(self, message: str) -> list[str]:
        """Names of the objects that hang on a message, what lies deepest last."""
        own = [name for (name,) in self._look("select child_id from object_children where parent_id = ?", message)]
        return own + [name for each in own for name in self.parts_of(each)]

    def _signed(self, party: str) -> int:
        number: int = self.post["seats"][party]
        return number - (1 << 64) if number >= 1 << 63 else number

    def _look(self, query: str, value: int | str) -> list[Any]:
        with closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as database:
            return database.execute(query, (value,)).fetchall()


def _bringing(node: Node, metadata: Metadata) -> bytes:
    tree = ObjectTree(object_id="f" * 64)
    message = Message(metadata=metadata)
    whole: bytes = PushMessagesRequest(
        node=node, messages_list=[message], message_object_trees=[tree]
    ).SerializeToString()
    return whole


@dataclass
class Robbed:
    """A run that a party with a valid key tried to read of, and what it was told."""

    result: dict[str, Any]
    peak: int
    through_the_gate: dict[str, tuple[int, bytes]]
    past_the_gate: tuple[int, bytes]


def rob(village: Village, out: Path) -> Robbed:
    """Run, and meanwhile ask in every way for what the coordinator has for another party, as party-0."""
    thief, victim = Thief(village, "party-0"), village.parties["party-1"]
    while not thief.online("party-1"):
        time.sleep(0.1)
    before = len(thief.messages_of("party-1"))
    going = go(village, out)
    while not (out / "work" / "name").exists():  # not while libraries load: after a minute a party is taken for gone
        assert going.process.poll() is None, going.words()
        time.sleep(0.1)
    os.killpg(victim.pid, signal.SIGSTOP)  # so that a message for it waits
    try:
        past: tuple[int, bytes] = 0, b""
        while b"describe" not in past[1]:  # until the question is there, whole
            assert going.process.poll() is None, going.words()
            time.sleep(0.1)
            found = thief.messages_of("party-1")
            parts = thief.parts_of(found[0][0]) if len(found) > before else []
            if parts:
                past = thief.ask(PULL, thief.pulling("party-0", found[0][1], parts[-1]), past_the_gate=True)
        told = {what: thief.ask(*request) for what, request in thief.wishes(*found[0], parts[-1]).items()}
    finally:
        os.killpg(victim.pid, signal.SIGCONT)
    result = going.finish()
    return Robbed(result, going.peak, told, past)


class Poisoner(Seat):
    """Joins as any party does, says of itself what is right, and answers each brief with something worse."""

    def _serve(self) -> None:
        answers = itertools.cycle(ANSWERS)
        about = {"name": self.name, "samples": 24, "mean_tokens": 30.0, "held_out": 100, "rank": 64}

        def reply(control: Control, frame: bytes) -> tuple[Control, bytes]:
            # What a coordinator asks while its first briefs are slow to be answered uses up no poison.
            return (about, b"") if control["verb"] in {"describe", "name"} else next(answers)

        self._door = listen(self._work / "line")
        threading.Thread(target=serve, args=(self._door, self.pulse.around(reply)), daemon=True).start()


class NoHost:
    """Never asked."""


def main(address: str, key: str) -> None:
    """Be a poisoner until ended."""
    identity = Identity.load(Path(key))
    asyncio.run(Poisoner(address, identity.name, identity, NoHost()).run())  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
