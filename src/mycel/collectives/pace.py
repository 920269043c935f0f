"""Two ranks of this machine that measure what a collective costs: ``python -m mycel.collectives.pace OUT`` each."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from mycel.collectives.ranks import process_group

SMALL, LARGE = 1, 1 << 20  # numbers


def seconds_of(numbers: int, times: int) -> float:
    """Median seconds of a sum over all ranks."""
    tensor, found = torch.ones(numbers), []
    for _ in range(times):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        found.append(time.perf_counter() - started)
    return median(found)


def product() -> float:
    """Median seconds of a matrix product on one core."""
    left, found = torch.randn(384, 384), []
    for _ in range(60):
        started = time.perf_counter()
        left @ left
        found.append(time.perf_counter() - started)
    return median(found)


def main() -> None:
    """Measure; rank 0 writes seconds of a call, seconds a byte, and how much slower a core is while both compute."""
    torch.set_num_threads(1)
    with process_group():
        call, burst = seconds_of(SMALL, 200), seconds_of(LARGE, 20)
        copy = max(burst - call, 1e-9) / (4 * LARGE)  # of two ranks each sends as much as the tensor holds
        alone = product() if dist.get_rank() == 0 else 0.0
        dist.barrier()
        together = product()
        if dist.get_rank() == 0:
            found = {"call": call, "copy": copy, "contention": max(0.0, together / alone - 1)}
            Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
