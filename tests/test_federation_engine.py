"""The engine over Flower's own apps, with a grid in memory in place of SuperLink and SuperNodes."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the federation extra is not installed")

import json
import socket
import struct

import httpx
from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mycel.data.parties import load_parties
from mycel.engines.engine import Arrival, Engine
from mycel.engines.flower.apps import BESIDE, client, pack, server, unpack
from mycel.engines.flower.engine import FlowerEngine
from mycel.engines.line import LINE, Control, accept, dial, listen, place_of, receive, send, serve
from mycel.engines.resident import PartyHost, Resident
from mycel.errors import EngineError
from mycel.federation import execute
from mycel.federation.demo import write_examples
from mycel.federation.execute import Federated
from mycel.federation.member import Membership, Task, base_sha256
from mycel.models.base import find_base
from mycel.recipe import load_recipe
from mycel.run.folder import RunFolder
from mycel.testing import check_engine
from mycel.testing.engines import Echo, request


class EchoParty(Echo):
    """Echo as a party's host."""

    def describe(self, arm: str, job: str, node: int) -> Control:
        return {"samples": 1}


TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1  # what Flower's own processes set first


class Neighbour(Membership):
    """A party beside others in one process, where models are opened one at a time."""

    opening = threading.Lock()

    def describe(self, arm: str, job: str, node: int) -> Control:
        with self.opening:
            return super().describe(arm, job, node)


class MemoryGrid(Grid):  # type: ignore[misc]
    """Calls the ClientApp of the addressed node in a thread of the node's own."""

    def __init__(self, contexts: dict[int, Context]) -> None:
        self._contexts, self._numbers = contexts, itertools.count(1)
        self._replies: dict[str, Message] = {}
        self._turns = {node: ThreadPoolExecutor(1) for node in contexts}  # each carries its messages in their order
        self.carried: list[tuple[int, int]] = []
        self.crashes = 0
        self.forgotten = False

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *arguments: Any, **options: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        numbers = []
        if self.forgotten:
            asked = httpx.Request("POST", "http://localhost/v1/runtime/push-messages")
            raise httpx.HTTPStatusError("401", request=asked, response=httpx.Response(401, request=asked))
        for message in messages:
            number = str(next(self._numbers))
            message.metadata.__dict__["_message_id"] = number
            numbers.append(number)
            self._turns[message.metadata.dst_node_id].submit(self._deliver, number, message)
        return numbers

    def _deliver(self, number: str, message: Message) -> None:
        if self.crashes:
            self.crashes -= 1
            self._replies[number] = Message(Error(code=7, reason="the app has crashed"), reply_to=message)
            return
        reply = client(message, self._contexts[message.metadata.dst_node_id])
        self.carried.append((len(unpack(message.content)[1]), len(unpack(reply.content)[1])))
        self._replies[number] = reply

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(number) for number in message_ids if number in self._replies]


class Parties:
    """Three residents, each behind a line of its own, and the grid that leads to them; hostile ones answer anything."""

    def __init__(self, folder: Path, hosts: Sequence[PartyHost]) -> None:
        self.folder = folder
        self.hostile: dict[int, Callable[[Control, bytes], tuple[Any, bytes]]] = {}
        self._runs = itertools.count()
        self.doors = [listen(folder / f"party-{node}") for node in range(3)]
        for node, door in enumerate(self.doors):
            resident = Resident(hosts[node], f"party {node}", folder / f"home-{node}")
            threading.Thread(target=serve, args=(door, self._reply(node, resident)), daemon=True).start()
        self.grid: MemoryGrid | None = None

    def _reply(self, node: int, resident: Resident) -> Callable[[Control, bytes], tuple[Any, bytes]]:
        return lambda control, frame: self.hostile.get(node, resident.reply)(control, frame)

    def engine(self, part: int = 1 << 20, most: int = 1 << 24, job: str = "") -> FlowerEngine:
        """Start a ServerApp and return the engine at the other end of its line: a run that no party has seen."""
        run = {"job": job or f"run {next(self._runs)}"}
        contexts = {
            node + 70: Context(1, node + 70, {"mycel": str(self.folder / f"party-{node}")}, RecordDict(), run)
            for node in range(3)
        }
        self.grid = MemoryGrid(contexts)
        path = self.folder / "line"
        os.environ[LINE] = str(path)
        with listen(place_of(path, run["job"])) as door:
            arguments = (self.grid, Context(1, 0, {}, RecordDict(), run))
            threading.Thread(target=server, args=arguments, daemon=True).start()
            line = accept(door)
        return FlowerEngine(line, [70, 71, 72], part=part, piece=part // 2, most=most)


@contextmanager
def _parties(hosts: Sequence[PartyHost] = ()) -> Iterator[Parties]:
    with tempfile.TemporaryDirectory() as folder:
        parties = Parties(Path(folder), hosts or [EchoParty() for _ in range(3)])
        try:
            yield parties
        finally:
            for door in parties.doors:
                door.close()


def _run(program: Callable[[Parties], Coroutine[Any, Any, None]]) -> None:
    with _parties() as parties:
        asyncio.run(program(parties))


async def _ask(engine: Engine, frame: bytes, generation: int = 1) -> Arrival:
    engine.ask(request(engine, 0, generation, frame))
    arrival = await engine.answer(engine.now() + 60)
    assert arrival is not None
    return arrival


@pytest.mark.parametrize("said", [b"", b"\x00\x00", struct.pack("!i", 9), struct.pack("!i", 9) + b"half", b"\x00" * 8])
def test_whoever_ends_in_the_middle_of_a_word_is_not_the_last_to_be_answered(said: bytes, tmp_path: Path) -> None:
    door = listen(tmp_path / "line")
    answering = threading.Thread(target=serve, args=(door, lambda control, frame: (control, frame)))
    answering.start()
    with socket.socket(socket.AF_UNIX) as broken:
        broken.connect(str(tmp_path / "line"))
        broken.sendall(said)
    with dial(str(tmp_path / "line")) as line:
        send(line, {"verb": "name"}, b"whole")
        assert receive(line) == ({"verb": "name"}, b"whole")
    door.shutdown(socket.SHUT_RDWR)
    answering.join()
    door.close()


def test_engine_obeys_the_contract() -> None:
    with _parties() as parties:
        check_engine(parties.engine, asyncio.run)


@pytest.mark.parametrize("length", [0, 1, 999, 1000, 1001, 5000])
def test_long_frames_travel_in_pieces_and_short_ones_in_one_message(length: int) -> None:
    brief = hashlib.shake_128(b"brief").digest(length)

    async def program(parties: Parties) -> None:
        engine = parties.engine(part=1000)
        arrival = await _ask(engine, brief)
        assert bytes(arrival.frame) == b"0:1:" + brief
        assert parties.grid is not None
        down, up = (1 if size <= 1000 else -(-size // 500) for size in (length, length + 4))
        assert len(parties.grid.carried) == down + up - 1
        assert max(max(sizes) for sizes in parties.grid.carried) <= 1000
        await engine.close()

    _run(program)


@pytest.mark.parametrize("length", [0, 1, BESIDE, BESIDE + 1])
def test_a_message_comes_out_of_flowers_records_as_it_went_in(length: int) -> None:
    control, frame = {"verb": "ask", "offset": 0}, hashlib.shake_128(b"frame").digest(length)
    content = pack(control, frame)
    assert unpack(content) == (control, frame)
    assert len(content) == (1 if length <= BESIDE else 2)


def test_a_brief_that_comes_again_gets_the_same_answer() -> None:
    async def program(parties: Parties) -> None:
        engine = parties.engine()
        first, again, other = [await _ask(engine, frame, n) for n, frame in enumerate((b"one", b"one", b"two"), 1)]
        assert bytes(first.frame) == bytes(again.frame) == b"0:1:one"
        assert bytes(other.frame) == b"0:2:two"
        await engine.close()

    _run(program)


def test_an_answer_longer_than_allowed_is_refused_before_it_travels() -> None:
    async def program(parties: Parties) -> None:
        engine = parties.engine(part=1000, most=3000)
        arrival = await _ask(engine, bytes(4000))
        assert "at most 3,000 are accepted" in arrival.refusal
        assert parties.grid is not None
        assert sum(up for _, up in parties.grid.carried) <= 1000
        await engine.close()

    _run(program)


def test_a_cut_line_is_an_error_and_not_a_wait() -> None:
    async def program(parties: Parties) -> None:
        engine = parties.engine()
        await _ask(engine, b"one")
        await engine.close()
        with pytest.raises(Exception, match="--resume"):
            engine.ask(request(engine, 0, 2, b"two"))

    _run(program)


def test_a_superlink_that_knows_nothing_of_the_run_any_more_ends_it_and_no_partys_part_in_it() -> None:
    async def program(parties: Parties) -> None:
        engine = parties.engine()
        await _ask(engine, b"one")
        assert parties.grid is not None
        parties.grid.forgotten = True
        engine.ask(request(engine, 0, 2, b"two"))
        with pytest.raises(EngineError, match="--resume"):
            await engine.answer(engine.now() + 60)
        await engine.close()

    _run(program)


PATIENT = "rounds.patience=1000"  # answers of milliseconds teach deadlines that a busy machine misses
SMALL = ["model.base=micro", "rounds.count=4", "rounds.local_steps=1", "trainable.rank=2"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["total", "seconds", "x"]), inner),
    max_leaves=6,
)
SAID = st.fixed_dictionaries({}, optional={"total": JSON, "seconds": JSON, "refusal": JSON, "samples": JSON})


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(answers=st.lists(st.tuples(JSON | SAID, st.binary(max_size=40)), min_size=1, max_size=3))
def test_whatever_a_party_says_becomes_an_answer_or_a_refusal(answers: list[tuple[Any, bytes]]) -> None:
    async def program(parties: Parties) -> None:
        replies = itertools.chain(answers, itertools.repeat(({"total": 0}, b"")))
        parties.hostile[0] = lambda control, frame: next(replies)
        engine = parties.engine(part=16, most=64)
        arrival = await _ask(engine, b"brief")
        assert arrival.refusal or len(arrival.frame) <= 64
        assert arrival.asked <= arrival.started <= arrival.computed <= arrival.at
        parties.hostile.clear()
        assert bytes((await _ask(engine, b"next", 2)).frame) == b"0:1:next"
        await engine.close()

    _run(program)


@dataclass
class Nearby:
    """A coordinator whose line is open already, and whose SuperLink was started again: its old numbers mean nobody."""

    numbers: dict[str, int]
    secure: bool = True
    looks: int = 0

    def seats(self) -> dict[str, int]:
        self.looks += 1
        return {name: number + 1000 * (self.looks == 1) for name, number in self.numbers.items()}

    async def line(self, job: str) -> Connection:
        raise AssertionError(job)

    def tell(self, standing: Mapping[str, Any]) -> None:
        assert json.dumps(standing)

    def close(self) -> None:
        pass


def test_a_hostile_party_is_refused_and_counted_and_the_others_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "AWAY", 0.1)
    recipe = load_recipe(
        "quickstart",
        ["data.count=3", "data.parties=iid", "data.examples=16", "data.held_out=4", "compare=[]", PATIENT, *SMALL],
    )
    base = find_base("micro")
    for number, party in enumerate(load_parties(recipe.data, recipe.seed)):
        (tmp_path / str(number)).mkdir()
        write_examples(tmp_path / str(number) / "train.jsonl", party.train)
        write_examples(tmp_path / str(number) / "held_out.jsonl", party.held_out)
    hosts = [Neighbour(f"party {number}", tmp_path / str(number), tmp_path / str(number)) for number in range(3)]
    bomb = struct.pack("<Q", 1 << 60) + b"{}"
    shape = {"shapes": {"update/x": [1 << 39]}, "codec": "int8", "kind": "answer"}
    listing = json.dumps({"__metadata__": {"mycel": json.dumps(shape)}}).encode()
    junk = [b"", b"no parcel at all", bomb, struct.pack("<Q", len(listing)) + listing, bytes(1 << 16)]
    sent = itertools.cycle(junk)

    def hostile(control: Control, frame: bytes) -> tuple[Control, bytes]:
        if control["verb"] == "describe":
            return {"name": "party 1", "samples": 16, "mean_tokens": 30.0, "held_out": 100, "rank": 2}, b""
        content = next(sent)
        return {"total": len(content), "seconds": 0.0}, content

    async def program(parties: Parties) -> None:
        parties.hostile[1] = hostile
        task = Task(recipe, "hostile", base_sha256(base))
        engine = parties.engine(job=task.to_json(), part=1 << 26)
        assert parties.grid is not None
        parties.grid.crashes = 2  # who has not been reached has not declined
        folder = RunFolder(tmp_path / "run")
        folder.work.mkdir(parents=True)
        going = Federated(recipe, folder, hub=Nearby({"party 0": 70, "party 1": 71, "party 2": 72}))
        with going.opened():
            coordinator = going.coordinate(engine, await going.gather(engine), base, tmp_path / "checkpoint")
            state = await coordinator.run()
        await engine.close()
        assert coordinator.progress.version == 4
        assert coordinator.progress.drops["invalid"] == 5
        assert not going.declined
        assert all(entry["answers"] == 2 for entry in coordinator.progress.rounds)
        assert all(bool(tensor.isfinite().all()) for tensor in state.shared.values())

    with _parties(hosts) as parties:
        asyncio.run(program(parties))
