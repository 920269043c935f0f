"""Attacks: ``python benchmarks/attacks.py [--part guards,observers,cut] [--guards "none;Krum"] [--json]``.

Six parties of unlike domains tune the base as in the quickstart; one of them has a canary eight times among its
examples. Attacks see what a curious coordinator sees. Scores that mean nothing was learnt: gradient recall 0, word
recall 0.05, canary exposure about 1 bit (8 is extraction), membership 0.5, domain 0.17, backdoor 0.

The safety rate is another run's: two of six parties tune on compliance with unsafe requests (`mycel.finetune.
safety_attack`), on a base that was taught to refuse; 1 refuses every held-out unsafe request, and what is left of it
when nobody attacks is printed beside the table. Noise comes from the seed, so that the table can be repeated.

observers   scores of whoever else looks, in the open and under masks: a party that reads its own briefs, and an
            eavesdropper on a line in the clear and under TLS
cut         share of a party's tokens that are read back from activations behind so many blocks, by a map that is fitted
            on the other parties' text: as they are, in 8 bits, and under a one-time pad
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import arguments, show, stopwatch
from guards import GUARDS
from mycel.data.parties import load_parties
from mycel.data.tokens import TokenTable
from mycel.finetune.safety_attack import safety_rate, tune, write_parties
from mycel.guard.attacks.inversion import read_cut
from mycel.guard.pad import to_ring
from mycel.models.base import find_base
from mycel.rounds.assaults import assault, stage
from mycel.rounds.laboratory import Laboratory, laboratory
from mycel.rounds.observers import observe
from mycel.wire.codecs import parse_codec
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
READ, LENGTH = 20, 48  # texts of each party that cross a cut, and their tokens


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


def guarded(lab: Laboratory, names: list[str], seed: int) -> list[dict[str, Any]]:
    """Point every attack at every guard."""
    rows = []
    world = lab.world(lab.recipe("fedavg", refusing(lab)))
    start = tune(world, world.starting_state(), LESSONS)
    for name in names:
        recipe = lab.recipe("fedavg", {**SETTINGS, **GUARDS[name], "seed": seed})
        with stopwatch() as seconds:
            scores = assault(lab, recipe) | {"safety rate": safety(lab, GUARDS[name], start)}
        rows.append({"guard": name, **scores, "seconds": seconds[0]})
    print(f"safety rate: {safety(lab, {}, start, 0.0):.2f} when nobody lies", file=sys.stderr)
    return rows


def observed(lab: Laboratory, seed: int) -> list[dict[str, Any]]:
    """Point the attacks at what each observer sees; lengths are tried under a codec that makes them differ as well."""
    rows = []
    for name, changes in (
        ("none", {}),
        ("masked sums", GUARDS["masked sums"]),
        ("none, raw+zstd", {"wire.codec": "raw+zstd"}),
    ):
        scene = stage(lab, lab.recipe("fedavg", {**SETTINGS, **changes, "seed": seed}))
        rows += [{"guard": name, **row} for row in observe(scene)]
    return rows


def cuts(lab: Laboratory, seed: int) -> list[dict[str, Any]]:
    """Read the first party's text back from activations at every depth."""
    base = lab.open_base()
    recipe = lab.recipe("fedavg", {**SETTINGS, "seed": seed})
    texts = []
    for party in load_parties(recipe.data, recipe.seed):
        ids = TokenTable.from_examples(party.train, base.tokenizer, recipe.data.max_length).ids.long()
        texts.append(ids[: min(len(ids) // LENGTH, READ) * LENGTH].reshape(-1, LENGTH))
    public, secret = torch.cat(texts[1:]), texts[0]
    veils = {"as they are": lambda hidden: hidden, "in 8 bits": eight_bits, "one-time pad": padded}
    depths = range(int(base.model.config.num_hidden_layers) + 1)
    return [
        {"blocks": depth, **{name: read_cut(base.model, depth, public, secret, veil) for name, veil in veils.items()}}
        for depth in depths
    ]


def eight_bits(hidden: Tensor) -> Tensor:
    """What a cut of the int8 codec delivers."""
    codec = parse_codec("int8")
    return codec.decode(codec.encode(hidden), tuple(hidden.shape))


def padded(hidden: Tensor) -> Tensor:
    """What whoever computes the next layer sees of its padded input, as numbers within 1."""
    ring = to_ring(hidden.numpy())
    pad = np.frombuffer(os.urandom(ring.nbytes), dtype=np.uint64).reshape(ring.shape)
    return torch.from_numpy((ring + pad).view(np.int64) / 2.0**63).float()


def main() -> None:
    """Measure the parts that are asked for."""
    options = arguments(
        __doc__ or "",
        part={"default": "guards,observers,cut", "help": "parts, with commas between"},
        guards={"default": ";".join(GUARDS), "help": "names of guards, with semicolons between"},
        base={"default": "micro", "help": "base model"},
        workers={"type": int, "default": -1, "help": "worker processes; 0: none; -1: one per core"},
        seed={"type": int, "default": 1, "help": "seed of the recipe"},
    )
    find_base(options.base)
    parts, about = options.part.split(","), f"base {options.base}, seed {options.seed}"
    with laboratory(workers=options.workers, base=options.base) as lab:
        if "guards" in parts:
            show(f"Attacks on {about}", guarded(lab, options.guards.split(";"), options.seed), options.json)
        if "observers" in parts:
            show(f"Who sees what, {about}", observed(lab, options.seed), options.json)
        if "cut" in parts:
            show(f"Tokens read back behind so many blocks, {about}", cuts(lab, options.seed), options.json)


if __name__ == "__main__":
    main()
