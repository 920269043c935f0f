"""Islands against their goals: ``python benchmarks/islands.py [--json] [--run FOLDER]``.

Three parts. The arms of ``mycel run islands`` (about two minutes; ``--run`` reads the folder of a run that is there):
bytes, loss and virtual seconds beside synchronous data parallelism. Inside an island, two ranks: a step beside a bare
PyTorch FSDP2 script's on the same work, in turns. And ACCO's stages in real time: two ranks whose sums cross a link
held to 100 Mbit/s while the next gradients are computed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import arguments, show
from mycel.recipe import load_recipe
from mycel.run.execute import run_recipe

RANK = Path(__file__).parent / "islands_rank.py"


def arms(folder: Path | None) -> list[dict[str, Any]]:
    """What each way to train the same islands came to."""
    if folder is None:
        with tempfile.TemporaryDirectory() as place:
            result = run_recipe(load_recipe("islands"), Path(place) / "run")
    else:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    plain = result["arms"]["synchronous"]
    return [
        {
            "arm": name,
            "loss": arm["loss"],
            "against synchronous": f"{arm['loss'] / plain['loss'] - 1:+.1%}",
            "MB": arm["bytes"] / 1e6,
            "times fewer": plain["bytes"] / arm["bytes"],
            "virtual seconds": arm["virtual_seconds"],
        }
        for name, arm in result["arms"].items()
    ]


def inside() -> dict[str, Any]:
    """What two ranks measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        starter = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        subprocess.run([sys.executable, *starter, str(RANK), str(out)], env=environment, check=True)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def goals(rows: list[dict[str, Any]], found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal beside what was measured."""
    named = {row["arm"]: row for row in rows}
    step, acco = found["overhead"], found["acco"]
    low, high = step["quartiles"]
    excess = named["diloco"]["loss"] / named["synchronous"]["loss"] - 1
    return [
        _goal("DiLoCo, 64 local steps: times fewer bytes", ">= 60", named["diloco"]["times fewer"], lambda x: x >= 60),
        _goal("DiLoCo: loss above synchronous", "<= 0.03", excess, lambda x: x <= 0.03),
        _goal(
            f"step beside bare FSDP2 (quartiles {low:.2f}, {high:.2f})", "<= 1.05", step["ratio"], lambda x: x <= 1.05
        ),
        _goal(
            f"ACCO, real: stage of {1e3 * acco['stage']:.0f} ms beside the longer of computing "
            f"{1e3 * acco['computing']:.0f} and sending {1e3 * acco['sending']:.0f}",
            "<= 1.1",
            acco["ratio"],
            lambda x: x <= 1.1,
        ),
        _goal("the same, one after the other", "about 2", acco["ratio_waiting"], lambda x: x > 1.5),
    ]


def _goal(name: str, goal: str, value: float, met: Any) -> dict[str, Any]:
    return {"what": name, "goal": goal, "measured": value, "met": "yes" if met(value) else "no"}


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__ or "", run={"type": Path, "help": "folder of a run of the recipe islands"})
    found = inside()
    rows = arms(options.run)
    if options.json:
        print(json.dumps({"arms": rows, "inside": found, "goals": goals(rows, found)}, indent=2))
        return
    show("Four islands, as many tokens", rows, as_json=False)
    show("Goals", goals(rows, found), as_json=False)


if __name__ == "__main__":
    main()
