"""A round over Flower: Mycel's federation against a bare Flower app that sends the same bytes, beyond local work.

Both run on a SuperLink and two SuperNodes on the loopback, over TLS with authenticated nodes, and work is nothing: a
party answers with as many bytes as it was sent. The bare app is written as Flower's documentation shows, one array
record each way, its replies polled with ``send_and_receive``. Goal: at most 1.1 times its seconds per round.

``--big`` instead runs one round of federated averaging whose state, and each of whose two answers, has 1 GB: the brief
goes out, the answers are checked and combined, the state moves. It reports the peak memory of the coordinator's
processes. Goal: at most 2.5 times the update.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import torch

from common import arguments, proportional_bytes, show
from mycel.engines import children
from mycel.engines.flower import launch
from mycel.engines.flower.engine import FlowerEngine
from mycel.engines.line import Control, listen, opened, place_of
from mycel.federation.keyring import Keyring
from mycel.federation.place import read_post
from mycel.federation.seat import Seat
from mycel.finetune.fedavg import FedAvg
from mycel.fleet import load_fleet
from mycel.guard.keys import Identity
from mycel.recipe.schema import Recipe
from mycel.rounds.coordinator import Coordinator
from mycel.rounds.pace import parse_pace
from mycel.rounds.site import Site
from mycel.rounds.system import State
from mycel.rounds.world import Node, World
from mycel.testing.engines import request
from mycel.wire.algebra import group, with_role
from mycel.wire.parcel import Parcel
from mycel.wire.shelf import Shelf

PARTIES = ("one", "two")
ROUNDS = 5
BARE = """
import json, sys, time
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()

@client.query()
def answer(message, context):
    return Message(RecordDict({"frame": message.content["frame"]}), reply_to=message)

@server.main()
def main(grid, context):
    frame = bytes(int(context.run_config["size"]))
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.5)
    seconds = []
    for number in range(int(context.run_config["rounds"])):
        began = time.perf_counter()
        record = ArrayRecord({"bytes": Array("uint8", (len(frame),), "bytes", frame)})
        messages = [Message(RecordDict({"frame": record}), dst_node_id=node, message_type="query") for node in nodes]
        replies = list(grid.send_and_receive(messages))
        assert all(len(reply.content["frame"]["bytes"].data) == len(frame) for reply in replies)
        seconds.append(time.perf_counter() - began)
    with open(context.run_config["out"], "w") as file:
        json.dump(seconds, file)
"""


class Mirror:
    """Answers with what it was sent; a brief of federated averaging with the state as the update."""

    def describe(self, arm: str, job: str, node: int) -> Control:
        """Take part in everything."""
        return {"samples": 1}

    def handle(self, arm: str, node: int, frame: bytes, home: bytes) -> tuple[bytes, bytes]:
        """Work is nothing."""
        if frame[8:9] != b"{":
            return frame, b""
        brief = Parcel.from_bytes(frame)
        return Parcel("answer", {"samples": 1}, with_role("update", group(brief.tensors, "shared"))).to_bytes(), b""


def party(address: str, key: str) -> None:
    """Be a party, in a process of its own."""
    identity = Identity.load(Path(key))
    asyncio.run(Seat(address, identity.name, identity, Mirror()).run())


@contextmanager
def federation(folder: Path) -> Iterator[tuple[str, int]]:
    """Start a coordinator and two parties; yield its address and the coordinator's process."""
    os.environ["MYCEL_STATE"] = str(folder / "state")
    address = f"127.0.0.1:{children.free_port()}"
    Keyring.make(folder / "keys", ["127.0.0.1"], PARTIES)
    commands = [["-m", "mycel", "coordinator", "--listen", address, "--keys", str(folder / "keys")]]
    commands += [[__file__, "--party", address, str(folder / f"keys/parties/{name}.pem")] for name in PARTIES]
    started = [
        children.start([sys.executable, *command], dict(os.environ), folder / f"{number}.log")
        for number, command in enumerate(commands)
    ]
    try:
        while True:
            try:
                read_post(address)
                break
            except Exception:
                time.sleep(0.2)
        yield address, started[0].pid
    finally:
        for process in reversed(started):
            children.end(process)


async def connect(address: str) -> FlowerEngine:
    """Return an engine of a fresh run, once both parties are there."""
    post = read_post(address)
    home = Path(os.environ["MYCEL_STATE"]) / "coordinators" / address.replace(":", "_")
    job = f"measure {time.time()}"
    with listen(place_of(post.line, job)) as door:
        door.setblocking(False)
        dialled = asyncio.ensure_future(asyncio.get_running_loop().sock_accept(door))
        await asyncio.to_thread(launch.submit, home, job)
        engine = FlowerEngine(opened((await dialled)[0]), list(post.seats.values()))
    while len(await engine.nodes()) < len(PARTIES):
        await asyncio.sleep(0.5)
    return engine


async def rounds(address: str, frame: bytes, count: int) -> list[float]:
    """Return the seconds of each of ``count`` rounds."""
    engine = await connect(address)
    seconds = []
    for number in range(count):
        began = time.perf_counter()
        for node in range(len(PARTIES)):
            engine.ask(request(engine, node, number * 10 + node, frame[:-1] + bytes([number])))
        for _ in PARTIES:
            arrival = await engine.answer(None)
            assert arrival is not None
            assert not arrival.refusal, arrival.refusal
        seconds.append(time.perf_counter() - began)
    await engine.close()
    return seconds


def bare(folder: Path, size: int, count: int) -> list[float]:
    """Return the seconds of each round of the bare app, on a SuperLink and SuperNodes without anything of ours."""
    from mycel.guard.keys import issue, make_authority, openssh_private, openssh_public, pem, spki

    folder.mkdir()
    root = make_authority("bare")
    own = issue(root, "superlink", ["127.0.0.1"])
    files = launch.Certificates(folder / "s.crt", folder / "s.key", folder / "ca.crt")
    for path, content in (
        (files.certificate, pem(own.certificate)),
        (files.key, pem(own.key)),
        (files.authority, pem(root.certificate)),
    ):
        path.write_bytes(content)
    port = children.free_port()
    started = [launch.superlink(folder, port, files, folder / "unused")]
    (folder / "app" / "mycel_apps.py").write_text(BARE)
    project = (folder / "app" / "pyproject.toml").read_text().replace('job = ""', 'size = 0\nrounds = 0\nout = ""')
    (folder / "app" / "pyproject.toml").write_text(project)
    try:
        time.sleep(8)
        for name in PARTIES:
            home, key = folder / name, issue(root, name).key
            home.mkdir()
            (home / "key").write_bytes(openssh_private(key))
            (home / "key.pub").write_bytes(openssh_public(spki(key.public_key())))
            launch.register(folder, home / "key.pub")
            started.append(
                launch.supernode(home, f"127.0.0.1:{port}", files.authority, home / "key", folder / "unused")
            )
        out = folder / "seconds.json"
        (folder / "run.toml").write_text(f'size = {size}\nrounds = {count}\nout = "{out}"\n')
        launch.flwr(folder, "run", str(folder / "app"), launch.SUPERLINK, "--run-config", str(folder / "run.toml"))
        while not out.exists() or not out.read_text():
            time.sleep(0.5)
        found: list[float] = json.loads(out.read_text())
        return found
    finally:
        for process in reversed(started):
            children.end(process)


def compare(size: int, count: int) -> dict[str, Any]:
    """Measure both, one after the other."""
    with tempfile.TemporaryDirectory() as name:
        with federation(Path(name)) as (address, _):
            ours = asyncio.run(rounds(address, bytes(size), count))[1:]
        theirs = bare(Path(name) / "bare", size, count)[1:]
    return {
        "megabytes": size / 1e6,
        "rounds": len(ours),
        "mycel_s": statistics.median(ours),
        "flower_s": statistics.median(theirs),
        "ratio": statistics.median(ours) / statistics.median(theirs),
    }


class Large(FedAvg):
    """Federated averaging over a state of so many bytes, in tensors of at most 64 MB."""

    size = 0

    def begin(self, world: World) -> State:
        """Count up."""
        count = -(-self.size // (1 << 26))
        return State(shared={f"w{index}": torch.ones(self.size // 4 // count) for index in range(count)})


async def one_round(address: str, size: int, folder: Path) -> None:
    """Run one round of federated averaging with a state of ``size`` bytes."""
    engine = await connect(address)
    nodes = [Node(index, name, 1, 1.0, 1) for index, name in enumerate(PARTIES)]
    made = Recipe().replace({"rounds.count": 1, "data.count": len(PARTIES), "fleet.devices": "equal"})
    model = SimpleNamespace(parameters=lambda: iter([torch.empty(size // 4, device="meta")]))
    world = World(made, load_fleet("equal"), nodes, cast(Site, SimpleNamespace(base=SimpleNamespace(model=model))))
    world.sizes = {None: size // 4}
    system = Large(made)
    system.size = size
    coordinator = Coordinator(
        world, system, engine, parse_pace("synchronous"), lambda event, **fields: None, shelf=Shelf(folder=folder)
    )
    coordinator.progress.delivered = True  # the round alone is measured
    state = await coordinator.run()
    assert all(bool((tensor == 2).all()) for tensor in state.shared.values()), "1 + the mean of 1 and 1 is 2"
    await engine.close()


def big(size: int) -> dict[str, Any]:
    """Run the large round and watch the memory of the coordinator's processes."""
    with tempfile.TemporaryDirectory() as name, federation(Path(name)) as (address, pid):
        peak, stop = dict[str, int](), threading.Event()

        def watch() -> None:
            nonlocal peak
            while not stop.wait(0.2):
                hub = psutil.Process(pid)
                now = {"run": proportional_bytes(os.getpid()), "coordinator": proportional_bytes(pid)}
                for process in hub.children(recursive=True):
                    now[_program(process)] = now.get(_program(process), 0) + proportional_bytes(process.pid)
                peak = max(peak, now, key=lambda each: sum(each.values()))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        began = time.perf_counter()
        asyncio.run(one_round(address, size, Path(name)))
        seconds = time.perf_counter() - began
        stop.set()
        watcher.join()
    return {
        "gigabytes": size / 1e9,
        "seconds": seconds,
        "peak_gb": sum(peak.values()) / 1e9,
        "times_the_update": sum(peak.values()) / size,
        "of which": ", ".join(f"{name} {held / 1e9:.2f}" for name, held in peak.items()),
    }


def _program(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return next((Path(word).name for word in process.cmdline() if Path(word).name.startswith("fl")), "other")
    return "gone"


def main() -> None:
    """Compare at 1 MB and at 100 MB, or be one of the parties."""
    options = arguments(
        __doc__ or "",
        party={"nargs": 2, "metavar": ("ADDRESS", "KEY"), "help": "be a party"},
        megabytes={"type": int, "nargs": "+", "default": [1, 100]},
        rounds={"type": int, "default": ROUNDS},
        big={"type": int, "default": 0, "metavar": "MB"},
    )
    if options.party:
        party(*options.party)
        return
    if options.big:
        show("a round of a large state, two parties", [big(options.big * 10**6)], options.json)
        return
    rows = [compare(size * 10**6, options.rounds) for size in options.megabytes]
    show("a round beyond local work, two parties, TLS on the loopback", rows, options.json)


if __name__ == "__main__":
    main()
