"""``mycel coordinator``, ``join`` and ``status``: a federation's doors."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

from mycel.errors import RunError


def coordinator_command(listen: str, keys: Path | None, insecure: bool) -> None:
    """Serve as a coordinator until stopped."""
    from mycel.federation.hub import Hub

    if insecure == (keys is not None):
        raise RunError("name the folder of keys with --keys, or say --insecure for plain text and no keys: one of them")
    _serve(Hub(listen, keys).run())


def join_command(
    address: str, key: Path | None, data: Path, name: str, consent: Path | None, insecure: bool, nproc: int
) -> None:
    """Take part in a federation until stopped: alone, as an island of processes, or as a rank under ``torchrun``."""
    from mycel.collectives.leading import Crew, Leader, follow
    from mycel.collectives.processes import RankProcesses
    from mycel.collectives.ranks import process_group, under_torchrun
    from mycel.federation.consent import read_consent
    from mycel.federation.keeping import forget_old_runs
    from mycel.federation.member import Membership, PrivateSites
    from mycel.federation.place import state_folder
    from mycel.federation.seat import Seat
    from mycel.guard.keys import Identity

    if insecure == (key is not None):
        raise RunError("name this party's key with --key, or say --insecure for plain text and no key: one of them")
    with ExitStack() as stack:
        ranks, leader = None, None
        if under_torchrun():
            device = stack.enter_context(process_group())
            if int(os.environ["RANK"]):
                follow(Crew(device))
                return
            leader = Leader(device)
            stack.callback(leader.dismiss)
        elif nproc > 1:
            # Forked now, before a thread or a connection is there that no other process may inherit.
            ranks = RankProcesses(nproc, PrivateSites)
            stack.callback(ranks.close)
        if not data.exists():
            raise RunError(
                f"--data names {str(data)!r}, which does not exist: a file or folder of this party's examples"
            )
        identity = Identity.load(key) if key else None
        name = identity.name if identity else name or data.resolve().name
        folder = state_folder("parties", f"{address}-{name}")
        forget_old_runs(folder)
        host = Membership(name, data, folder, read_consent(consent), ranks, leader)
        _serve(Seat(address, name, identity, host).run(), folder / "party.log")


def status_command(address: str, as_json: bool, key: Path | None = None) -> None:
    """Show how a coordinator and its run stand."""
    from mycel.federation.reach import standing

    found = standing(address, key)
    if as_json:
        print(json.dumps(found, indent=2, allow_nan=False))
        return
    from mycel.cli.standing import show_standing

    show_standing(found, Console())


def _serve(program: Coroutine[Any, Any, None], log: Path | None = None) -> None:
    """Run a service until it is told to stop."""
    handlers: list[logging.Handler] = [RichHandler(console=Console(stderr=True), show_path=False)]
    if log is not None:
        handlers.append(logging.FileHandler(log))
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers)

    async def until_stopped() -> None:
        task = asyncio.ensure_future(program)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            print("mycel: stopped", file=sys.stderr)

    asyncio.run(until_stopped())
