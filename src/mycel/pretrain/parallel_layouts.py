"""Parallelisation layouts: which way to divide a model is best, and by which rules one could have known.

Hagemann et al. 2023, "Efficient Parallelization Layouts for Large-Scale Distributed Model Training" (catalogue number
53). The study enumerates micro-batch, tensor and pipeline degrees and recomputation under the memory, and finds: buy
memory with more ranks rather than with recomputation; a micro-batch of one row; pipelines rather than tensor ranks.

    utilisation = tokens a second x (6 W + 12 L h T) / peak operations a second

Here the same is done twice: over layouts of two ranks that are really run on this machine, and over large models on
64 accelerators by the cost model, whose order of layouts is held against an event simulation of their pipelines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mycel.decisions.cost import GIB, Coefficients, Predicted, Work, predict, stage_seconds
from mycel.decisions.graph import graph_of
from mycel.decisions.layout import layouts
from mycel.decisions.timeline import pipeline, simulate
from mycel.errors import EngineError
from mycel.fleet.device import Device, Link
from mycel.recipe.schema import Layout
from mycel.rounds.laboratory import Laboratory, Measured

RANK = Path(__file__).with_name("layout_rank.py")
# What `benchmarks/planner.py` fitted to ranks of one machine; what other machines are like, `mycel fleet probe` says.
SPEED = 75.0
HERE = Coefficients(call=2.1e-3, cores=os.cpu_count() or 1, update=1.9e-8, copy=4e-9, contention=0.55, reference=SPEED)
LARGE = ((4096, 32, 2048), (5120, 40, 2048), (5120, 40, 8192), (6656, 60, 2048))  # width, blocks, tokens of a row
ACCELERATOR = Device("accelerator", 1.5e5, 80, link=Link(8e5, 8e5, 0.005))


def run_layouts(ranks: int = 2) -> list[dict[str, Any]]:
    """Run every layout of so many ranks on this machine."""
    with tempfile.TemporaryDirectory(prefix="mycel-") as folder:
        out = Path(folder) / "found.json"
        starter = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        path = os.pathsep.join(part for part in sys.path if part)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, *starter, str(RANK), str(out)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise EngineError(f"the layouts could not be run: {done.stderr[-300:]}")
        rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return rows


def foretold(layout: Layout, ranks: int) -> Predicted:
    """What the cost model says of a layout that was run."""
    from mycel.pretrain.layout_rank import LENGTH, ROWS, config

    shape = config()
    work = Work(graph_of(shape, LENGTH), ROWS)
    split = [shape.num_hidden_layers // layout.pipeline] * layout.pipeline
    return predict(work, layout, split, [Device("rank", SPEED, link=Link(1e9, 1e9, 0.0))] * ranks, HERE)


def ranked_alike(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's correlation of two orders."""
    from scipy.stats import spearmanr

    return float(spearmanr(left, right).statistic)


def large_layouts(width: int, blocks: int, length: int, rows: int = 512) -> list[tuple[Layout, float, bool]]:
    """Every layout of a large model over 64 accelerators: step seconds, and whether it fits."""
    from mycel.models.random_llama import llama_config

    config = llama_config(width, blocks, 32000, width * 8 // 3 // 256 * 256, width // 128)
    work, known, found = Work(graph_of(config, length), rows), Coefficients(operation=2e-5, call=5e-6), []
    for pieces in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        for plain in layouts(64, config, rows, length, pieces):
            if blocks % plain.pipeline or plain.tensor > 8 or plain.sequence > 1:
                continue
            # Without a pipeline micro-batches are pieces of a rank's rows as well.
            plain = plain.model_copy(update={"micro_batches": pieces})
            if rows // plain.data % pieces or (plain.pipeline > 1 and pieces < plain.pipeline):
                continue
            for layout in (plain, plain.model_copy(update={"recompute": True})):
                split = [blocks // plain.pipeline] * plain.pipeline
                layout = layout.model_copy(update={"schedule": "1f1b" if plain.pipeline > 1 else "gpipe"})
                cost = predict(work, layout, split, [ACCELERATOR] * 64, known)
                fits = cost.memory <= ACCELERATOR.memory_gib * GIB
                found.append((layout, cost.seconds, fits))
    return found


def against_simulation(width: int = 5120, blocks: int = 40, length: int = 2048, rows: int = 512) -> float:
    """Correlation of predicted and simulated computing over pipelines of a large model."""
    from transformers import LlamaConfig

    config = LlamaConfig(vocab_size=32000, hidden_size=width, intermediate_size=13824, num_hidden_layers=blocks)
    work, guessed, simulated = Work(graph_of(config, length), rows), [], []
    for stages in (2, 4, 5, 8, 10):
        for pieces in (8, 16, 64):
            for recompute in (False, True):
                layout = Layout(data=8, pipeline=stages, micro_batches=pieces, schedule="1f1b", recompute=recompute)
                split = [blocks // stages] * stages
                devices = [ACCELERATOR] * (8 * stages)
                known = Coefficients()
                guessed.append(predict(work, layout, split, devices, known).parts["compute"])
                times = [stage_seconds(work, layout, split, place, devices[:8], known) for place in range(stages)]
                ways = [[seconds * share for seconds in times] for share in (1 / 3, 2 / 3)]
                simulated.append(simulate(pipeline(ways[0], ways[1], [0.0] * stages, pieces)).seconds)
    return ranked_alike(guessed, simulated)


def claim(lab: Laboratory) -> Measured:
    """What is best of all that was run, and whether the study's rules would have found it."""
    from mycel.pretrain.layout_rank import LENGTH, ROWS, config

    rows = run_layouts()
    by = {json.dumps(row["layout"], sort_keys=True): row for row in rows}
    pairs = [
        (row, by[json.dumps({**row["layout"], "recompute": True}, sort_keys=True)])
        for row in rows
        if not row["layout"]["recompute"]
    ]
    slower = sum(again["seconds"] > plain["seconds"] for plain, again in pairs)
    smaller = sum(again["bytes"] < plain["bytes"] for plain, again in pairs)
    best = min(rows, key=lambda row: row["seconds"])
    order = ranked_alike([foretold(Layout(**row["layout"]), 2).seconds for row in rows], [r["seconds"] for r in rows])
    graph = graph_of(config(), LENGTH)
    rate = ROWS * LENGTH / best["seconds"] * graph.flops(1.0)
    kept = ones = 0
    for shape in LARGE:
        fitting = [(layout, seconds) for layout, seconds, fits in large_layouts(*shape) if fits]
        layout, _ = min(fitting, key=lambda each: each[1])
        kept += not layout.recompute
        ones += 512 // layout.data // layout.micro_batches == 1
    simulated = against_simulation()
    named = ", ".join(f"{axis} {best['layout'][axis]}" for axis in ("data", "tensor", "pipeline", "sequence"))
    return Measured(
        f"best of {len(rows)} layouts run on 2 ranks: {named}, recomputing {best['layout']['recompute']}, "
        f"{rate / 1e9:.0f} GFLOP/s; recomputation is slower in {slower} of {len(pairs)} and smaller in {smaller}; the "
        f"cost model orders them with a correlation of {order:.2f}, pipelines of a large model as their simulation "
        f"with {simulated:.2f}; for {len(LARGE)} large models on 64 accelerators the best that fits does without "
        f"recomputation in {kept} and has micro-batches of one row in {ones}",
        not best["layout"]["recompute"]
        and slower >= 0.8 * len(pairs)
        and smaller >= 0.8 * len(pairs)
        and simulated > 0.9
        and order > 0.6
        and kept == len(LARGE),
        {"order": order, "simulated": simulated, "slower": slower, "smaller": smaller, "kept": kept, "ones": ones},
    )
