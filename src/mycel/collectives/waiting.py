"""Waiting for ranks that may take long, and not for ranks that are gone.

Gloo's connections to a process end with it, and whoever waits on them hears of it at once. So a message is waited for
as long as its sender computes; only the meeting itself, where there is no connection yet, has a limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from mycel.wire.parcel import Limits

MEETING = timedelta(seconds=20)  # within which ranks that all are there connect to each other
FOREVER = timedelta(days=30)  # of a message; torch has no word for it
LIMITS = Limits(frame_bytes=1 << 40, elements=1 << 40)  # of what ranks of one program take from each other


def unhurried(group: dist.ProcessGroup | None = None) -> None:
    """Let this group's collectives (None: everybody's) wait for ranks that still compute."""
    _set_pg_timeout(FOREVER, group)


def group_of(ranks: Sequence[int] | None = None) -> dist.ProcessGroup | None:
    """Make a group of some ranks, or of all; everybody calls it, and None is returned to those outside."""
    group = dist.new_group(None if ranks is None else list(ranks), backend="gloo", timeout=MEETING)
    if not isinstance(group, dist.ProcessGroup):
        return None
    unhurried(group)
    return group


def done(work: dist.Work | None) -> None:
    """Wait for a message that is under way."""
    if work is not None:
        work.wait(FOREVER)


def send(tensor: Tensor, target: int, group: dist.ProcessGroup | None = None) -> None:
    """Send to a rank, and wait until it has gone."""
    done(dist.isend(tensor, target, group=group))


def receive(tensor: Tensor, source: int, group: dist.ProcessGroup | None = None, tag: int = 0) -> Tensor:
    """Fill a tensor with what a rank sends, and return it."""
    done(dist.irecv(tensor, source, group=group, tag=tag))
    return tensor
