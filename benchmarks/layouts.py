"""Every layout of 1, 2 and 4 ranks, really run: ``python benchmarks/layouts.py [--json] [--keep FILE]``.

Some are run again with unlike ranks: one that is let run half of the time, one whose messages are held back as a link
of 200 Mbit/s and a millisecond would, and two ranks on one core.

Seconds are medians of whole steps, bytes what all ranks sent in one, memory the fullest rank's tensors. Beside them,
the step of a bare PyTorch FSDP2 script on the same work: an island's overhead is the ratio of the two.
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

from common import arguments, show

RANK = Path(__file__).parent / "layouts_rank.py"


def run_all(counts: tuple[int, ...] = (1, 2, 4), scenes: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Run every layout of every world and return what was measured."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            out = Path(folder) / f"{count}.json"
            starter = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            subprocess.run([sys.executable, *starter, str(RANK), str(out), *scenes], env=environment, check=True)
            rows += json.loads(out.read_text(encoding="utf-8"))
    return rows


def named(layout: dict[str, Any]) -> str:
    """Degrees of a layout in a few letters."""
    text = "".join(f"{axis[0]}{layout[axis]}" for axis in ("data", "tensor", "pipeline", "sequence"))
    blocks = "/".join(map(str, layout["blocks"]))
    return text + (f" m{layout['micro_batches']} {blocks}".rstrip() if layout["pipeline"] > 1 else "")


def main() -> None:
    """Measure and print."""
    options = arguments(
        __doc__ or "",
        keep={"type": Path, "help": "also write what was measured, for planner.py"},
        scenes={"nargs": "+", "default": [], "help": "equal, slow rank, thin link, one core; all when none is named"},
        ranks={"type": int, "nargs": "+", "default": [1, 2, 4], "help": "worlds to run"},
    )
    rows = run_all(tuple(options.ranks), options.scenes)
    if options.keep:
        options.keep.write_text(json.dumps(rows), encoding="utf-8")
    plain = {(row["ranks"], tuple(row["shape"])): row["bare"] for row in rows if "bare" in row}
    shown = [
        {
            "scene": row["scene"]["name"],
            "shape": "x".join(map(str, row["shape"])),
            "layout": named(row["layout"]),
            "ms": 1e3 * row["seconds"],
            "MB sent": row["bytes"] / 1e6,
            "MB held": row["memory"] / 1e6,
            "against bare FSDP2": (
                f"{row['seconds'] / plain[row['ranks'], tuple(row['shape'])]:.2f}"
                if row["layout"]["data"] == row["ranks"]
                and row["scene"]["name"] == "equal"
                and (row["ranks"], tuple(row["shape"])) in plain
                else ""
            ),
        }
        for row in rows
        if "layout" in row
    ]
    show(f"{len(shown)} layouts, {os.cpu_count()} cores", shown, options.json)


if __name__ == "__main__":
    main()
