"""Mycel against Flower's own simulation: the same model, data and steps, whole processes, wall time and memory.

Flower runs as its users run it: its message API, one CPU per client, the base kept in each actor between clients,
LoRA states as array records. Goals: at least 1.25 times faster at 10 local steps, 3 times at 1 step, a third of the
memory. Flower's simulation extra is installed by this script if it is missing, into the environment that runs it: give
it one of its own if that matters.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import arguments, peak_memory, recipe, show, stopwatch, write_store

PARTIES, ROUNDS = 20, 5
FLOWER = "flwr[simulation]>=1.41,<1.42"


def run_mycel(base: Path, store: Path, steps: int) -> None:
    """Run the federation with one worker per core, start-up included."""
    from mycel.rounds.simulation import Simulation, workplace

    with workplace(-1) as place:
        world = place.open("system", recipe(PARTIES, ROUNDS, steps, -1), base, store)
        Simulation("system", world, place.labour).run()


def run_flower(base: Path, store: Path, steps: int) -> None:
    """Run the same with Flower's simulation engine."""
    from flwr.simulation import run_simulation

    from flower_app import make_apps

    server, client = make_apps(str(base), str(store), steps, ROUNDS)
    resources = {"num_cpus": 1, "num_gpus": 0.0}
    run_simulation(server, client, PARTIES, backend_config={"client_resources": resources})


def measure(which: str, base: Path, store: Path, steps: int) -> dict[str, float]:
    """Run one contestant in a fresh process; return its wall seconds and the peak memory of its process tree."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, "--contestant", which, "--base", str(base), "--store", str(store)]
    with peak_memory(itself=False) as peak, stopwatch() as seconds:
        subprocess.run([*command, "--steps", str(steps)], env=environment, check=True, stdout=subprocess.DEVNULL)
    return {"seconds": seconds[0], "peak_mb": peak.bytes / 1e6}


def compare(base: Path, store: Path, steps: int) -> dict[str, Any]:
    """Measure both, one after the other."""
    ours, theirs = (measure(which, base, store, steps) for which in ("mycel", "flower"))
    return {
        "local_steps": steps,
        "mycel_s": ours["seconds"],
        "flower_s": theirs["seconds"],
        "times_faster": theirs["seconds"] / ours["seconds"],
        "mycel_mb": ours["peak_mb"],
        "flower_mb": theirs["peak_mb"],
        "memory_share": ours["peak_mb"] / theirs["peak_mb"],
    }


def install() -> None:
    """Install Flower's simulation extra where it is missing, held to the project's lock file."""
    if importlib.util.find_spec("flwr") and importlib.util.find_spec("ray"):
        return
    print(f"installing {FLOWER}", file=sys.stderr)
    # Flower pins some libraries elsewhere than our lock file does; only PyTorch has to stay as it is.
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        FLOWER,
        f"torch=={version('torch').partition('+')[0]}",
    ]
    subprocess.run(command, check=True, stdout=sys.stderr)


def main() -> None:
    """Compare at 10 steps and at 1, or be one of the contestants."""
    options = arguments(
        __doc__ or "",
        contestant={"choices": ["mycel", "flower"]},
        base={"type": Path},
        store={"type": Path},
        steps={"type": int, "nargs": "+", "default": [10, 1]},
    )
    if options.contestant:
        run = run_mycel if options.contestant == "mycel" else run_flower
        run(options.base, options.store, options.steps[0])
        return
    install()
    from mycel.models.base import find_base

    base = find_base("tiny")
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "tokens.safetensors", PARTIES)
        rows = [compare(base, store, steps) for steps in options.steps]
    show(f"{PARTIES} parties, {ROUNDS} rounds, batches of 8 x 128 tokens", rows, options.json)
    print(json.dumps({"base": base.name}), file=sys.stderr)


if __name__ == "__main__":
    main()
