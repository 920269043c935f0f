"""The way in: a member that asks the swarm, for one model, for as long as a block of code runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from mycel.models.base import find_base
from mycel.segments.client import SwarmModel
from mycel.segments.swarm import Swarm


@asynccontextmanager
async def join_model(swarm: str, model: str, codec: str = "raw", patience: float = 30.0) -> AsyncIterator[SwarmModel]:
    """Join a swarm and open a model that its peers hold.

    Parameters
    ----------
    swarm : str
        Folder of the swarm, or of an invitation.
    model : str
        What the peers were started with: a built-in size, a folder, or a Hugging Face id.
    codec : str
        How states cross.
    patience : float
        Seconds to wait for blocks that nobody holds.
    """
    folder = find_base(model)
    peers = await Swarm.load(Path(swarm)).join()
    try:
        opened = await SwarmModel.open(peers, folder, codec, patience)
        try:
            yield opened
        finally:
            await opened.close()
    finally:
        await peers.close()
