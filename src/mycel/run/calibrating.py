"""How this machine departs from its nominal speed: the coefficients with which the cost model foretells its islands.

A training step of small decoders of several shapes takes

    operations / speed  +  passes x blocks x seconds of a pass  +  weights x seconds of the optimiser a number

which non-negative least squares solve for the three; two ranks measure what a collective costs, and one step is weighed
for the factor on activations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mycel.decisions.cost import NOMINAL, Work, memory_of
from mycel.decisions.graph import Graph, graph_of
from mycel.errors import EngineError
from mycel.models.footprint import Footprint
from mycel.recipe.schema import Layout

SHAPES = ((64, 2, 4, 32), (128, 4, 8, 64), (128, 2, 16, 64), (192, 4, 8, 128), (192, 8, 2, 64))
PASSES = 3.0  # of a block in a step: one forward, and two back


def calibrate(seconds: float) -> tuple[float, dict[str, float]]:
    """Return 10^9 operations a second of one core that trains, and how ranks of this machine depart from that.

    Raises
    ------
    EngineError
        Two ranks could not be started or did not hear of each other.
    """
    pace = between_ranks()
    rows, right, factor = [], [], 1.0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for shape in SHAPES:
            taken, graph, factor = _step(shape, 0.6 * seconds / len(SHAPES))
            tokens = shape[2] * shape[3]
            rows.append([graph.flops(tokens) / taken, PASSES * shape[1] / taken, graph.weights / taken])
            right.append(1.0)  # in relative terms, so that small steps count as much as large ones
    finally:
        torch.set_num_threads(threads)
    from scipy.optimize import nnls

    scale = [max(row[column] for row in rows) for column in range(3)]
    solved, _ = nnls([[row[column] / scale[column] for column in range(3)] for row in rows], right)
    inverse, operation, update = (float(value) / scale[column] for column, value in enumerate(solved))
    if not inverse:
        raise EngineError("this machine's speed could not be measured: it was too busy; try again, or longer --seconds")
    speed = round(1e-9 / inverse, 3)
    return speed, {
        "operation": operation,
        "update": update,
        **pace,
        "activation": factor,
        "reference": speed,
        "cores": float(os.cpu_count() or 1),
    }


def _step(shape: tuple[int, int, int, int], seconds: float) -> tuple[float, Graph, float]:
    """Median seconds of a step, the model's chain, and the factor on activations."""
    from transformers import LlamaForCausalLM

    from mycel.models.random_llama import llama_config

    hidden, blocks, batch, length = shape
    config: Any = llama_config(hidden, blocks, 1024, 3 * hidden)
    model, graph = LlamaForCausalLM(config).train(), graph_of(config, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    rows, taken = torch.randint(0, 1024, (batch, length)), list[float]()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()

    step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 3:
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    with Footprint() as footprint:
        step()
    held = 3 * 4 * graph.weights  # values and moments, which were there before
    work = Work(graph, batch)
    one, none = (memory_of(work, Layout(), (blocks,), 0, replace(NOMINAL, activation=share)) for share in (1.0, 0.0))
    return median(taken), graph, max(0.1, (footprint.peak + held - none) / (one - none))


def between_ranks() -> dict[str, float]:
    """What two ranks of this machine measure of each other: ``call``, ``copy`` and ``contention`` of the cost model."""
    with tempfile.TemporaryDirectory(prefix="mycel-") as folder:
        out = Path(folder) / "pace.json"
        words = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(part for part in sys.path if part),
        }
        done = subprocess.run(
            [sys.executable, *words, "-m", "mycel.collectives.pace", str(out)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not out.exists():
            reason = next(iter(reversed(done.stderr.strip().splitlines())), "they ended without a word")
            raise EngineError(f"two ranks of this machine could not measure their link: {reason[:200]}")
        found: dict[str, float] = json.loads(out.read_text(encoding="utf-8"))
    return found
