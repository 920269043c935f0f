"""Sums over ranks that travel while the next ones are computed: what ACCO's stages do in real time.

A stage gathers gradients in this thread; the sum of what was made in the stage before crosses the ranks meanwhile, on a
thread of its own, and both are waited for. A stage therefore takes the longer of computing and sending. The link may be
held to a rate, as a wide-area link would, for measurements on one machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from mycel.wire.parcel import Tensors

Made = tuple[Tensors, int]  # gradients summed over so many target tokens


@dataclass
class Overlap:
    """Exchanges one stage's gradients while the next one's are made.

    Parameters
    ----------
    megabits : float
        Per second and rank, that an exchange may send at most; 0: as fast as the ranks' own link.

    Attributes
    ----------
    sent : int
        Bytes of this rank's exchanges, by what a ring must send.
    """

    group: dist.ProcessGroup | None = None
    megabits: float = 0.0
    sent: int = 0
    _thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="mycel-overlap")
    )

    def __post_init__(self) -> None:
        # Messages of training's own group, sent from another thread, would be taken for one another.
        self.group = self.group or dist.new_group(backend="gloo")

    def stage(self, compute: Callable[[], Made], before: Made) -> tuple[Made, Made]:
        """Return what ``compute`` made, and the sum over the ranks of what each of them had made before."""
        travelling = self._thread.submit(self.sum, before)
        made = compute()
        return made, travelling.result()

    def sum(self, made: Made) -> Made:
        """Sum gradients and tokens over the ranks, and take as long as the link would."""
        started = time.perf_counter()
        gradients, tokens = made
        flat = torch.cat([tensor.reshape(-1) for tensor in gradients.values()])
        count = torch.tensor([tokens], dtype=torch.int64)
        dist.all_reduce(flat, group=self.group)
        dist.all_reduce(count, group=self.group)
        ranks = dist.get_world_size(self.group)
        size = 2 * flat.numel() * flat.element_size() * (ranks - 1) // ranks
        self.sent += size
        if self.megabits:
            time.sleep(max(0.0, size * 8e-6 / self.megabits - (time.perf_counter() - started)))
        parts = torch.split(flat, [tensor.numel() for tensor in gradients.values()])
        summed = {name: part.view_as(tensor) for (name, tensor), part in zip(gradients.items(), parts, strict=True)}
        return summed, int(count)

    def close(self) -> None:
        """Wait for what still travels, and end the thread."""
        self._thread.shutdown()
