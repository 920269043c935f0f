"""``mycel run --nproc N``: the ranks of an island as child processes, started again when one of them is killed.

The first that ends badly is noticed at once and ends the others, which would wait for it. Ranks that were killed are
started again from the last whole checkpoint: as many, and fewer once they are killed again before there is a new one
(a machine whose memory does not hold so many). A rank that ends with an error of its own is not started again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path

from mycel.collectives.program import checkpoint_folder
from mycel.collectives.saving import whole_steps
from mycel.decisions.layout import carried, check_layout, layouts, ranks_of
from mycel.engines.children import LOOPBACK, die_with_parent, free_port
from mycel.errors import EngineError, RecipeError
from mycel.models.base import find_base, open_base
from mycel.recipe.schema import Layout, Recipe

GRACE = 1.0  # seconds for a rank's death to be seen after a neighbour failed of it
KEPT = ("checkpoint_every", "recovery")  # of a layout, when fewer ranks share the work, besides memory and codec


def launch(recipe: Recipe, words: Sequence[str], ranks: int, out: Path, resume: bool) -> int:
    """Run ``mycel`` with ``words`` on so many ranks of this machine until they have finished; return the exit status.

    Raises
    ------
    EngineError
        A single rank was killed twice and no checkpoint lay between.
    """
    layout, steps = recipe.layout, -1
    while True:
        with started([*words, *_division(recipe, layout)], ranks, resume) as processes:
            status, killed = outcome(processes)
        if not killed:
            return status
        found = max(whole_steps(checkpoint_folder(out)), default=0)
        if found <= steps:
            layout = smaller(recipe, ranks)
            ranks = ranks_of(layout)
        steps, resume = found, (out / "recipe.json").exists()
        print(f"mycel: a rank was killed; going on from step {steps} with {ranks} ranks", file=sys.stderr, flush=True)


def smaller(recipe: Recipe, ranks: int) -> Layout:
    """The plainest layout of fewer ranks, as many as divide the model and its batches."""
    base = open_base(find_base(recipe.model.base))
    rows, length = recipe.training.batch_size, recipe.data.max_length
    for fewer in range(ranks - 1, 0, -1):
        for layout in layouts(fewer, base.model.config, rows, length):
            kept = carried(recipe.layout, layout)
            kept = kept.model_copy(update={name: getattr(recipe.layout, name) for name in KEPT})
            try:
                check_layout(kept, fewer, base.model.config, rows, length)
            except RecipeError:
                continue
            return kept
    raise EngineError(
        "the one rank that was left was killed before a checkpoint was written (out of memory?): "
        "try layout.recompute=true, or a smaller training.batch_size, and --resume"
    )


def _division(recipe: Recipe, layout: Layout) -> list[str]:
    """Overrides that turn the recipe's layout into this one; JSON values are TOML's too."""
    return [
        f"layout.{name}={json.dumps(value)}"
        for name, value in layout.model_dump(mode="json").items()
        if value != recipe.layout.model_dump(mode="json")[name]
    ]


@contextmanager
def started(words: Sequence[str], ranks: int, resume: bool) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start one process for each rank; whatever is left of them at the end is killed and waited for."""
    common = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())}
    common["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "mycel", *words, *(["--resume"] * resume)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=environment, preexec_fn=die_with_parent))
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def outcome(processes: Sequence[subprocess.Popen[bytes]]) -> tuple[int, bool]:
    """Wait until all have finished or one has failed; return the exit status, and whether one was killed."""
    ends = {os.pidfd_open(process.pid): process for process in processes}
    try:
        running = dict(ends)
        while running:
            for end in wait(list(running)):
                assert isinstance(end, int)
                process = running.pop(end)
                if process.wait():
                    return _failure(process, list(running.values()))
        return 0, False
    finally:
        for end in ends:
            os.close(end)


def _failure(first: subprocess.Popen[bytes], others: list[subprocess.Popen[bytes]]) -> tuple[int, bool]:
    deadline = time.monotonic() + GRACE
    while first.returncode > 0 and time.monotonic() < deadline:
        if any((other.poll() or 0) < 0 for other in others):
            return 1, True
        time.sleep(0.02)
    return abs(first.returncode), first.returncode < 0
