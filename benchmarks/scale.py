"""How many parties one machine simulates: peak memory and time per party-round from 10 to 1,000 parties.

Every party trains in every round. Goals: the peak of 1,000 parties is at most that of 10 plus 300 MB, over all
processes; time per party-round is flat within 20 %.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import arguments, peak_memory, recipe, show, stopwatch, write_store
from mycel.models.base import find_base
from mycel.rounds.simulation import Simulation, workplace

ROUNDS = 2


def measure(parties: int, base: Path, folder: Path) -> dict[str, Any]:
    """Run ``parties`` for two rounds of one step of one row-batch each and return memory and time."""
    store = write_store(folder / f"tokens-{parties}.safetensors", parties, examples=16)
    with peak_memory() as peak, workplace(-1) as place:
        world = place.open("scale", recipe(parties, ROUNDS, 1, -1), base, store)
        with stopwatch() as seconds:
            Simulation("scale", world, place.labour).run()
    return {
        "parties": parties,
        "peak_mb": peak.bytes / 1e6,
        "seconds": seconds[0],
        "ms_per_party_round": 1e3 * seconds[0] / parties / ROUNDS,
    }


def main() -> None:
    """Measure each size and print it beside the smallest."""
    options = arguments(__doc__ or "", sizes={"type": int, "nargs": "+", "default": [10, 100, 1000]})
    base = find_base("tiny")
    with tempfile.TemporaryDirectory() as folder:
        measure(2, base, Path(folder))
        rows = [measure(parties, base, Path(folder)) for parties in options.sizes]
    for row in rows:
        row["mb_over_first"] = row["peak_mb"] - rows[0]["peak_mb"]
        row["time_ratio"] = row["ms_per_party_round"] / rows[0]["ms_per_party_round"]
    show("simulated parties on one machine", rows, options.json)


if __name__ == "__main__":
    main()
