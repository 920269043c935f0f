"""What the benchmarks share: equal synthetic parties, memory of a process tree, and a table or JSON at the end."""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from mycel.data.tokens import TokenStore, TokenTable
from mycel.recipe.schema import Recipe

TOKENS = 128
VOCABULARY = 2048


def arguments(about: str, **extra: dict[str, Any]) -> argparse.Namespace:
    """Parse ``--json`` and whatever else a benchmark takes."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    for name, options in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    return parser.parse_args()


def show(title: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print rows as a table, or as JSON."""
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:,.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


def recipe(parties: int, rounds: int, steps: int, workers: int, **changes: Any) -> Recipe:
    """Return a federated LoRA recipe: tiny base, rank 16, batches of 8 rows of 128 tokens, every device alike."""
    return Recipe().replace(
        {
            "data.count": parties,
            "data.max_length": TOKENS,
            "rounds.count": rounds,
            "rounds.local_steps": steps,
            "rounds.evaluate_every": rounds,
            "fleet.devices": "equal",
            "engine.workers": workers,
            **changes,
        }
    )


def write_store(path: Path, parties: int, examples: int = 64) -> Path:
    """Write equal parties of random tokens, every row exactly 128 long, one held-out row each."""
    count = parties * (examples + 1)
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (count * TOKENS,), generator=source, dtype=torch.int32)
    offsets = torch.arange(count + 1, dtype=torch.int64) * TOKENS
    table = TokenTable(ids, offsets, torch.full((count,), TOKENS // 2, dtype=torch.int32), 2)
    train = [party * examples for party in range(parties)]
    held_out = [parties * examples + party for party in range(parties + 1)]
    TokenStore(tuple(f"party-{party}" for party in range(parties)), table, (*train, *held_out)).save(path)
    return path


@dataclass
class Peak:
    """Largest memory seen, in bytes: proportional shares summed over this process and all below it."""

    bytes: int = 0
    processes: int = 0


@contextmanager
def peak_memory(interval: float = 0.5, itself: bool = True) -> Iterator[Peak]:
    """Sample the memory of all processes below this one, and ``itself``, while the block runs."""
    peak, stop = Peak(), threading.Event()

    def sample() -> None:
        while not stop.wait(interval):
            total = count = 0
            below = psutil.Process().children(recursive=True)
            for process in [psutil.Process(), *below] if itself else below:
                total += proportional_bytes(process.pid)
                count += 1
            if total > peak.bytes:
                peak.bytes, peak.processes = total, count

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def proportional_bytes(pid: int) -> int:
    """Proportional memory of a process; 0 once it is gone. The kernel's summary is cheap, its full list is not."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Measure the wall seconds of a block; the list holds them afterwards."""
    found: list[float] = []
    started = time.perf_counter()
    try:
        yield found
    finally:
        found.append(time.perf_counter() - started)
