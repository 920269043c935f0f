"""``mycel demo federation``: the quickstart over a coordinator and three parties, beside the same run in process."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from mycel.cli.progress import show_progress
from mycel.data.parties import load_parties
from mycel.errors import EngineError
from mycel.federation.demo import PROGRAM, Village, village
from mycel.models.base import find_base
from mycel.recipe import load_recipe
from mycel.recipe.schema import Recipe
from mycel.run.execute import run_recipe

THREE = ['data.parties="dirichlet(0.5)"', "data.count=3", "compare=[]"]


def demo_command(name: str, overrides: list[str], as_json: bool) -> None:
    """Show that three organisations come to what one process comes to."""
    recipe = load_recipe(name, [*THREE, *overrides])
    messages = Console(stderr=True)
    with show_progress(messages) as watcher, tempfile.TemporaryDirectory(prefix="mycel-demo-") as folder:
        find_base(recipe.model.base, watcher.phase)
        parties = load_parties(recipe.data, recipe.seed)
        watcher.phase("starting a coordinator and three parties", 0, 1)
        with village(Path(folder) / "village", parties) as made:
            watcher.phase("starting a coordinator and three parties", 1, 1)
            watcher.phase("the federation's run", 0, 1)
            began = time.monotonic()
            federated = run_on(made, name, [*THREE, *overrides], Path(folder) / "federated")
            seconds = time.monotonic() - began
            watcher.phase("the federation's run", 1, 1)
            traffic = _traffic(made)
        reference = run_recipe(recipe, Path(folder) / "in-process", watcher=watcher)
    found = summary(recipe, federated, reference, seconds, traffic)
    if as_json:
        print(json.dumps(found, indent=2, allow_nan=False))
        return
    Console().print(
        f"state on three parties  {found['state_sha256']}\nstate in one process    {found['state_sha256_in_process']}\n"
        f"{'the same' if found['same_state'] else 'DIFFERENT'}; {found['bytes']:,} bytes of parcels, {seconds:.1f} s"
    )


def run_on(made: Village, name: str, overrides: list[str], out: Path, *arguments: str) -> dict[str, Any]:
    """Run a recipe on a village and return its result."""
    command = [*PROGRAM, "run", name, *overrides, "--out", str(out), "--on", made.address, "--json", *arguments]
    done = subprocess.run(command, env=made.environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"the run failed: {done.stderr.strip()[-1000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _traffic(made: Village) -> dict[str, Any]:
    time.sleep(1.5)  # the gate writes its ledger once a second
    done = subprocess.run(
        [*PROGRAM, "status", made.address, "--json"], env=made.environment, capture_output=True, text=True, check=False
    )
    found: dict[str, Any] = json.loads(done.stdout)["gate"].get("traffic", {}) if not done.returncode else {}
    return found


def summary(
    recipe: Recipe, federated: dict[str, Any], reference: dict[str, Any], seconds: float, traffic: dict[str, Any]
) -> dict[str, Any]:
    """Return what the demonstration shows."""
    socket = {
        purpose: sum(party[way].get(purpose, 0) for party in traffic.values() for way in ("received", "sent"))
        for purpose in ("parcels", "protocol", "polling", "handshakes")
    }
    return {
        "same_state": federated["state_sha256"] == reference["state_sha256"],
        "state_sha256": federated["state_sha256"],
        "state_sha256_in_process": reference["state_sha256"],
        "parties": [party["name"] for party in federated["parties"]],
        "rounds": recipe.rounds.count,
        "seconds": round(seconds, 3),
        "bytes": federated["bytes"]["up"] + federated["bytes"]["down"],
        "bytes_on_sockets": socket,
        "dropped": federated["dropped"],
    }
