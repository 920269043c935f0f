"""The verbs of a swarm: make one, lend a machine to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PANEL = "A swarm"


def add_swarm_commands(app: typer.Typer) -> None:
    """Add ``mycel swarm`` and ``mycel peer``."""
    app.command(rich_help_panel=PANEL, epilog="Example: mycel swarm ./ours --meet 192.0.2.7:7447")(swarm)
    app.command(rich_help_panel=PANEL, epilog="Example: mycel peer --join ./ours --model tiny --memory 4GiB")(peer)


def swarm(
    folder: Annotated[Path, typer.Argument(help="Folder of the swarm; made when missing.", metavar="SWARM")],
    meet: Annotated[str, typer.Option(help="HOST:PORT at which members of a new swarm meet.")] = "127.0.0.1:7447",
    invite: Annotated[str, typer.Option(help="Write an invitation for this member, and end.")] = "",
    reachable: Annotated[
        list[str] | None, typer.Option(help="Name or address under which the invited member is reached.")
    ] = None,
) -> None:
    """Be the place where a swarm's members meet; who is invited holds a certificate of its authority."""
    from mycel.cli.swarm import swarm_command

    swarm_command(folder, meet, invite, reachable or [])


def peer(
    join: Annotated[str, typer.Option(help="Folder of the swarm, or of an invitation.", metavar="SWARM")],
    model: Annotated[str, typer.Option(help="A built-in size, a folder, or a Hugging Face id.")],
    memory: Annotated[str, typer.Option(help="Most memory, such as 4GiB; by default half of what is free.")] = "",
    blocks: Annotated[str, typer.Option(help="auto, or FIRST:LAST such as 0:8.")] = "auto",
    listen: Annotated[str, typer.Option(help="HOST:PORT to be reached at directly; else outbound only.")] = "",
    name: Annotated[str, typer.Option(help="Name in the swarm; an invitation says it itself.")] = "",
    threads: Annotated[int, typer.Option(help="Threads to compute with; 0: all cores.", min=0)] = 0,
    weights: Annotated[
        str, typer.Option(help="resident, mapped, tiered(N) or window(N): more blocks than memory holds.")
    ] = "resident",
) -> None:
    """Lend this machine to a swarm: it takes the blocks needed most, and moves when another place is better."""
    from mycel.cli.swarm import Lending, peer_command

    peer_command(Lending(join, model, memory, blocks, listen, name, threads, weights))
