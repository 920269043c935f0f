"""``mycel swarm``, ``mycel peer`` and ``mycel status SWARM``."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from mycel.cli.serve import need

SEEN = 1.5  # seconds in which announcements are gathered


class Lending(NamedTuple):
    """What ``mycel peer`` was asked for."""

    join: str
    model: str
    memory: str
    blocks: str
    listen: str
    name: str
    threads: int
    weights: str


def swarm_command(folder: Path, meet: str, invite: str, reachable: list[str]) -> None:
    """Make the swarm if it is new; write an invitation, or be the meeting place until interrupted."""
    need("zenoh", "cryptography", extra="swarm")
    from mycel.segments.swarm import Swarm

    messages = Console(stderr=True)
    found = Swarm.load(folder) if (folder / "swarm.json").is_file() else Swarm.create(folder, meet)
    if invite:
        written = found.invite(invite, tuple(reachable) or ("localhost", "127.0.0.1"))
        messages.print(f"invitation for {invite}: {written} (keep it secret on its way)")
        return

    async def meet_here() -> None:
        peers = await found.join("meeting-place", router=True)
        messages.print(f"{found.name} meets at {found.routers[0]}; lend a machine: mycel peer --join {folder}")
        try:
            await interrupted()
        finally:
            await peers.close()

    asyncio.run(meet_here())


def peer_command(lending: Lending) -> None:
    """Lend this machine until interrupted."""
    need("zenoh", "cryptography", extra="swarm")
    messages = Console(stderr=True)
    with messages.status("loading libraries") as status:
        import torch

        from mycel.models.base import find_base
        from mycel.segments.lender import Lender, parse_blocks, parse_memory
        from mycel.segments.swarm import Swarm

        memory, blocks = parse_memory(lending.memory), parse_blocks(lending.blocks)
        found = Swarm.load(Path(lending.join))
        if lending.threads:
            torch.set_num_threads(lending.threads)
        folder = Path(lending.model)
        if not (folder / "config.json").is_file():  # of a folder, a peer needs no tokeniser
            folder = find_base(lending.model, lambda phase, done, total: status.update(f"{phase} {done}/{total}"))

    async def lend() -> None:
        peers = await found.join(lending.name, lending.listen)
        say = lambda sentence: messages.print(f"{peers.name} {sentence}")  # noqa: E731
        try:
            lender = Lender(peers, folder, memory, blocks, say, lending.weights)
            try:
                await lender.start()
                gc.freeze()  # the libraries' objects stay for good: no use looking through them again and again
                await interrupted()
            finally:
                await lender.close()
        finally:
            await peers.close()

    asyncio.run(lend())


def swarm_status_command(folder: str, as_json: bool) -> None:
    """Draw who holds what."""
    need("zenoh", "cryptography", extra="swarm")
    from mycel.segments.swarm import Swarm

    async def look() -> dict[str, dict[str, Any]]:
        peers = await Swarm.load(Path(folder)).join()
        try:
            await asyncio.sleep(SEEN)
            return peers.members()
        finally:
            await peers.close()

    members = asyncio.run(look())
    if as_json:
        print(json.dumps({"swarm": folder, "members": members}, indent=2))
    else:
        Console().print(holdings(members))


def holdings(members: dict[str, dict[str, Any]]) -> Table:
    """Return a table with a bar of blocks for each peer, and how often each block is held."""
    serving = {name: facts for name, facts in members.items() if isinstance(facts.get("depth"), int)}
    table = Table(title=f"{len(serving)} peers", title_justify="left")
    for column in ("peer", "model", "blocks", "blocks/s"):
        table.add_column(column)
    for name, facts in serving.items():
        first, last, depth = facts["first"], facts["last"], facts["depth"]
        bar = "·" * first + "█" * (last - first) + "·" * (depth - last)
        table.add_row(name, str(facts["model"]), f"{bar} {first}:{last}", f"{1 / max(facts['seconds'], 1e-9):,.0f}")
    for model in sorted({str(facts["model"]) for facts in serving.values()}):
        held = [facts for facts in serving.values() if facts["model"] == model]
        copies = [sum(f["first"] <= block < f["last"] for f in held) for block in range(held[0]["depth"])]
        table.add_row("copies", model, "".join(str(min(count, 9)) for count in copies), "")
    return table


async def interrupted() -> None:
    """Wait for SIGINT or SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()
