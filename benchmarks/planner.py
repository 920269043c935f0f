"""Predicted against measured, over layouts really run: ``python benchmarks/planner.py [--measured FILE] [--json]``.

The cost model of ``mycel.decisions.cost`` is fitted to every third layout of equal ranks that ``benchmarks/layouts.py``
measured on this machine (speed of a core, seconds of a block's pass and of a collective call, bandwidth between ranks,
activations), and held to the others, unlike ranks and thin links among them: median errors of seconds, memory and
bytes, and how far its choice lies from the best that was run.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from common import arguments, show
from layouts import named, run_all
from layouts_rank import config
from mycel.decisions.cost import Coefficients, Predicted, Work, predict
from mycel.decisions.graph import graph_of
from mycel.decisions.layout import stage_blocks
from mycel.fleet.device import Device, Link
from mycel.recipe.schema import Layout

CORES = os.cpu_count() or 1


def predicted(row: dict[str, Any], known: Coefficients) -> Predicted:
    """Return the cost model's answer for a layout on ranks of this machine; the last may be unlike the others."""
    hidden, blocks, rows, tokens = row["shape"]
    layout = Layout(**row["layout"])
    scene, last = row["scene"], row["ranks"] - 1
    link = Link(1e9, 1e9, 0.0)  # within the machine, bytes cost what handling them does
    thin = Link(scene["mbps"], scene["mbps"], scene["latency_ms"]) if scene["mbps"] else link
    devices = [
        Device(
            "rank",
            gflops=known.reference * (scene["speed"] if rank == last else 1),
            link=thin if rank == last else link,
        )
        for rank in range(row["ranks"])
    ]
    work = Work(graph_of(config(hidden, blocks), tokens), rows)
    split = [len(part) for part in stage_blocks(blocks, layout.pipeline, layout.blocks or None)]
    return predict(work, layout, split, devices, replace(known, cores=scene["cores"] or CORES))


def fit(rows: list[dict[str, Any]]) -> Coefficients:
    """Find the machine's figures that explain measured steps best, in logarithms of seconds."""

    def unpack(point: Any) -> Coefficients:
        speed, operation, call, update, copy, contention = (float(value) for value in np.exp(point))
        return Coefficients(operation, call, 1.0, CORES, update, copy, contention, speed)

    def errors(point: Any) -> list[float]:
        known = unpack(point)
        return [float(np.log(predicted(row, known).seconds / row["seconds"])) for row in rows]

    start = np.log([30.0, 2e-4, 3e-4, 3e-9, 2e-9, 0.2])
    known = unpack(least_squares(errors, start, loss="soft_l1").x)
    return replace(known, activation=median(_factor(row, known) for row in rows))


def _factor(row: dict[str, Any], known: Coefficients) -> float:
    """Return the factor on activations with which a layout's memory comes out as measured."""
    one = predicted(row, known).memory
    none = predicted(row, replace(known, activation=0.0)).memory
    return float((row["memory"] - none) / (one - none))


def rivals(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layouts that a plan for a row's ranks could choose: all of theirs, and those that leave the last ones out."""
    cores = row["scene"]["cores"]
    return [
        other
        for other in rows
        if other["shape"] == row["shape"]
        and (
            (other["scene"]["name"], other["ranks"]) == (row["scene"]["name"], row["ranks"])
            or (other["scene"]["name"] == "equal" and other["ranks"] < row["ranks"] and other["ranks"] <= (cores or 99))
        )
    ]


def main() -> None:
    """Fit, score and print."""
    options = arguments(__doc__ or "", measured={"type": Path, "nargs": "+", "help": "what layouts.py --keep wrote"})
    found = (
        [row for path in options.measured for row in json.loads(path.read_text(encoding="utf-8"))]
        if options.measured
        else run_all()
    )
    rows = [row for row in found if "layout" in row]
    equal = [row for row in rows if row["scene"]["name"] == "equal"]
    fitted, held = equal[::3], [row for index, row in enumerate(equal) if index % 3]
    held += [row for row in rows if row["scene"]["name"] != "equal"]
    known = fit(fitted)
    shown = []
    for row in held:
        cost = predicted(row, known)
        shown.append(
            {
                "scene": row["scene"]["name"],
                "shape": "x".join(map(str, row["shape"])),
                "layout": named(row["layout"]),
                "ms": 1e3 * row["seconds"],
                "predicted ms": 1e3 * cost.seconds,
                "seconds off": abs(cost.seconds / row["seconds"] - 1),
                "memory off": abs(cost.memory / row["memory"] - 1),
                "bytes off": abs(cost.bytes / row["bytes"] - 1) if row["bytes"] else 0.0,
            }
        )
    choices: dict[tuple[Any, ...], float] = {}
    for row in rows:
        same = rivals(row, rows)
        chosen = min(same, key=lambda each: predicted(each, known).seconds)
        key = (row["scene"]["name"], row["ranks"], *row["shape"])
        if len(same) > 1:
            choices[key] = chosen["seconds"] / min(each["seconds"] for each in same) - 1
    totals = {
        "layouts": len(held),
        "choices": len(choices),
        "median seconds error": median(row["seconds off"] for row in shown),
        "median memory error": median(row["memory off"] for row in shown),
        "median bytes error": median(row["bytes off"] for row in shown if row["bytes off"] is not None),
        "worst choice above the best run": max(choices.values()),
        "median choice above the best run": median(choices.values()),
        "GFLOP/s a core": known.reference,
        "ns a byte": 1e9 * known.copy,
        "contention": known.contention,
        "us a pass": 1e6 * known.operation,
        "us a call": 1e6 * known.call,
        "activations": known.activation,
    }
    if options.json:
        print(json.dumps({"layouts": shown, "totals": totals}, indent=2))
        return
    show(f"{len(held)} layouts that the model was not fitted to", shown, False)
    show("In all", [totals], False)


if __name__ == "__main__":
    main()
