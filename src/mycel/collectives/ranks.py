"""The process group of an island and its meshes: who is next to whom on which axis."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mycel.decisions.layout import AXES
from mycel.errors import EngineError
from mycel.recipe.schema import Layout

PATIENCE = timedelta(minutes=5)  # of a collective whose other ranks are still at work


@dataclass(frozen=True)
class Ranks:
    """One rank's view of an island.

    Attributes
    ----------
    mesh : DeviceMesh
        Over the axes of ``AXES``; an axis of one rank is there too.
    replicas : DeviceMesh
        Ranks over which gradients are averaged: those that see other rows or other tokens.
    device : torch.device
        Where this rank computes.
    """

    layout: Layout
    mesh: DeviceMesh
    replicas: DeviceMesh
    device: torch.device

    def place(self, axis: str) -> int:
        """This rank's place along an axis."""
        return int(self.mesh.get_local_rank(axis))

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks along an axis through this one."""
        return self.mesh.get_group(axis)

    @property
    def first(self) -> bool:
        """Whether this is rank 0 of the island."""
        return dist.get_rank() == 0


def under_torchrun() -> bool:
    """Whether this process is a rank that ``torchrun`` started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@dataclass(frozen=True)
class Meeting:
    """Where ranks of one machine meet that no ``torchrun`` started: a file, and each one's number of so many."""

    file: str
    rank: int
    size: int


@contextmanager
def process_group(meeting: Meeting | None = None) -> Iterator[torch.device]:
    """Join the ranks at a meeting, or those that ``torchrun`` describes in the environment; leave them at the end.

    Raises
    ------
    EngineError
        There is no meeting and the environment describes none.
    """
    wanted = () if meeting else ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if name not in os.environ]
    if missing:
        raise EngineError(f"the environment has no {missing[0]}: start ranks with `mycel run --nproc N` or torchrun")
    gpu, here = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0)) if meeting is None else meeting.rank
    device = torch.device("cuda", here % torch.cuda.device_count()) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    if meeting is None:
        dist.init_process_group(backend, timeout=PATIENCE)
    else:
        store = FileStore(meeting.file, meeting.size)
        dist.init_process_group(backend, store=store, rank=meeting.rank, world_size=meeting.size, timeout=PATIENCE)
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextmanager
def island(layout: Layout) -> Iterator[Ranks]:
    """Join the ranks that the environment describes, laid out; leave them at the end."""
    with process_group() as device:
        yield make_ranks(layout, device)


def make_ranks(layout: Layout, device: torch.device) -> Ranks:
    """Lay the meshes over all ranks of a process group that has been joined."""
    # Hints about collectives that could be merged, once for every shape.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    mesh = init_device_mesh(device.type, tuple(getattr(layout, axis) for axis in AXES), mesh_dim_names=AXES)
    return Ranks(layout, mesh, mesh["data", "sequence"]._flatten("replicas"), device)
