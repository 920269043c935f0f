"""FastServe on the live engine at load 0.9 with heavy-tailed lengths, beside first come, first served.

The claim of ``mycel claims fastserve`` on several seeds: ``python benchmarks/fair_queues.py --seeds 1,2,3``.
"""

from __future__ import annotations

import time

import torch

from common import arguments, show
from mycel.generation.executor import Whole
from mycel.models.base import find_base, open_base
from mycel.serve.fastserve import measure


def main() -> None:
    options = arguments(__doc__ or "", seeds={"default": "1,2,3"})
    torch.set_num_threads(1)
    executor = Whole(open_base(find_base("tiny")).model)
    rows = []
    for seed in map(int, options.seeds.split(",")):
        started = time.perf_counter()
        found = measure(executor, seed)
        rows.append(
            {
                "seed": seed,
                "fcfs ms": 1e3 * found["live_fcfs"],
                "foretold": 1e3 * found["foretold_fcfs"],
                "fastserve ms": 1e3 * found["live_fastserve"],
                "foretold ": 1e3 * found["foretold_fastserve"],
                "ratio": found["ratio"],
                "error": found["error"],
                "error before": found["error_before"],
                "pace": found["pace_fastserve"],
                "copied early": int(found["early_fastserve"]),
                "seconds": time.perf_counter() - started,
            }
        )
    show("FastServe at load 0.9, live", rows, options.json)


if __name__ == "__main__":
    main()
