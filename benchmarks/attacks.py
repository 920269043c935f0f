"""What guards are worth against attacks: ``python benchmarks/attacks.py [--json] [--guards none,median]``.

Six parties of unlike domains tune the base as in the quickstart; one of them has a canary eight times among its
examples. Attacks see what a curious coordinator sees. Scores that mean nothing was learnt: gradient recall 0, word
recall 0.05, canary exposure about 1 bit (8 is extraction), membership 0.5, domain 0.17, backdoor 0.

The safety rate is another run's: two of six parties tune on compliance with unsafe requests (`mycel.finetune.
safety_attack`), on a base that was taught to refuse; 1 refuses every held-out unsafe request, and what is left of it
when nobody attacks is printed beside the table. Noise comes from the seed, so that the table can be repeated.
"""

from __future__ import annotations

import sys
from typing import Any

from common import arguments, show, stopwatch
from mycel.finetune.safety_attack import safety_rate, tune, write_parties
from mycel.models.base import find_base
from mycel.rounds.assaults import GUARDS, assault
from mycel.rounds.laboratory import Laboratory, laboratory
from mycel.wire.parcel import Tensors

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

LESSONS = 240  # steps in which the base is taught to refuse


def safety(lab: Laboratory, guard: dict[str, Any], start: Tensors, share: float = 0.34) -> float:
    """Safety rate after rounds in which ``share`` of the parties tune on compliance."""
    lie = {"threat.attack": "unsafe", "threat.share": share} if share else {}
    return safety_rate(lab.run(lab.recipe("fedavg", {**refusing(lab), **lie, **guard}), start=start))


def refusing(lab: Laboratory) -> dict[str, Any]:
    """Settings of parties that hold refusals, as the claim of ``safety_attack`` has them."""
    return {
        "data.parties": write_parties(lab.folder / "safety"),
        "data.held_out": 12,
        "rounds.local_steps": 8,
        "rounds.evaluate_every": 4,
        "guard.replayable": True,
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
        world = lab.world(lab.recipe("fedavg", refusing(lab)))
        start = tune(world, world.starting_state(), LESSONS)
        for name in options.guards.split(","):
            recipe = lab.recipe("fedavg", {**SETTINGS, **GUARDS[name], "seed": options.seed})
            with stopwatch() as seconds:
                scores = assault(lab, recipe) | {"safety rate": safety(lab, GUARDS[name], start)}
            rows.append({"guard": name, **scores, "seconds": seconds[0]})
        print(f"safety rate: {safety(lab, {}, start, 0.0):.2f} when nobody lies", file=sys.stderr)
    show(f"Attacks on base {options.base}, seed {options.seed}", rows, options.json)


if __name__ == "__main__":
    main()
