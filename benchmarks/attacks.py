"""What guards are worth against attacks: ``python benchmarks/attacks.py [--json] [--guards none,median]``.

Six parties of unlike domains tune the base as in the quickstart; one of them has a canary eight times among its
examples. Attacks see what a curious coordinator sees. Scores that mean nothing was learnt: gradient recall 0, word
recall 0.05, canary exposure about 1 bit (8 is extraction), membership 0.5, domain 0.17, backdoor 0. Safety is measured
by the claim of the system ``safety_attack``. Noise comes from the seed, so that the table can be repeated.
"""

from __future__ import annotations

from typing import Any

from common import arguments, show, stopwatch
from mycel.models.base import find_base
from mycel.rounds.assaults import GUARDS, assault
from mycel.rounds.laboratory import laboratory

SETTINGS: dict[str, Any] = {
    "data.examples": 48,
    "data.max_length": 64,
    "rounds.count": 6,
    "rounds.local_steps": 10,
    "rounds.evaluate_every": 6,
    "trainable.rank": 16,
    "training.learning_rate": 1e-2,
    "guard.replayable": True,
    "knobs": {"server_rate": 1.5},
}


def main() -> None:
    """Point every attack at every guard."""
    options = arguments(
        __doc__ or "",
        guards={"default": ",".join(GUARDS), "help": "names of guards, with commas between"},
        base={"default": "micro", "help": "base model"},
        workers={"type": int, "default": -1, "help": "worker processes; 0: none; -1: one per core"},
        seed={"type": int, "default": 1, "help": "seed of the recipe"},
    )
    find_base(options.base)
    rows = []
    with laboratory(workers=options.workers, base=options.base) as lab:
        for name in options.guards.split(","):
            recipe = lab.recipe("fedavg", {**SETTINGS, **GUARDS[name], "seed": options.seed})
            with stopwatch() as seconds:
                scores = assault(lab, recipe)
            rows.append({"guard": name, **scores, "seconds": seconds[0]})
    show(f"Attacks on base {options.base}, seed {options.seed}", rows, options.json)


if __name__ == "__main__":
    main()
