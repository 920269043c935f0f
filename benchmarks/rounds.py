"""What the rounds machinery costs beyond the local training it is there for.

Two questions, each answered as a ratio to a bare PyTorch loop of the same work, measured in turns in this run:

- ``overhead``: Mycel in one process against the bare loop in the same process (goal: at most 1.05).
- ``all cores``: Mycel on every core against the bare work of all parties divided by the cores, where the bare work
  is timed with as many bare loops side by side as there are cores (goal: 1.05 with 10 local steps, 1.25 with 1).
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from common import arguments, recipe, show, stopwatch, write_store
from mycel.data.tokens import TokenStore, batches
from mycel.models.base import find_base, open_base
from mycel.models.trainable import build_trainable
from mycel.recipe.schema import Recipe
from mycel.rounds.simulation import Simulation, Workplace, workplace

PARTIES, ROUNDS = 8, 3


class BareLoop:
    """Federated averaging as one would write it by hand: no parcels, no checks, no clock."""

    def __init__(self, base: Path, store: Path, steps: int) -> None:
        self.base, self.store, self.steps = open_base(base), TokenStore.open(store), steps
        self.adapter = build_trainable(Recipe().trainable, self.base)
        self.start = self.adapter.initial(0)

    def local(self, party: int, version: int) -> dict[str, torch.Tensor]:
        """Train one party from the start and return its state."""
        parameters = self.adapter.parameters()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.start[name])
        optimizer = torch.optim.AdamW(parameters.values(), lr=3e-3, weight_decay=0.0)
        for batch in batches(self.store.train(party), 8, self.steps, party + version, 0, "causal"):
            optimizer.zero_grad(set_to_none=True)
            self.base.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
            ).loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def run(self, parties: range, rounds: int = ROUNDS) -> None:
        """Train ``parties`` for every round and average them."""
        with self.adapter.active():
            for version in range(rounds):
                states = [self.local(party, version) for party in parties]
                self.start = {name: torch.stack([state[name] for state in states]).mean(0) for name in self.start}


def mycel(place: Workplace, base: Path, store: Path, steps: int, workers: int, arm: str) -> float:
    """Return wall seconds of the same work through Mycel."""
    world = place.open(arm, recipe(PARTIES, ROUNDS, steps, workers), base, store)
    with stopwatch() as seconds:
        Simulation(arm, world, place.labour).run()
    return seconds[0]


def overhead(base: Path, store: Path, steps: int, repeats: int) -> dict[str, Any]:
    """Compare one process with one process, in turns."""
    bare = BareLoop(base, store, steps)
    ratios, ours, theirs = [], [], []
    with workplace(0) as place:
        mycel(place, base, store, 1, 0, "warm")
        for repeat in range(repeats):
            ours.append(mycel(place, base, store, steps, 0, f"run-{repeat}"))
            with stopwatch() as seconds:
                bare.run(range(PARTIES))
            theirs.append(seconds[0])
            ratios.append(ours[-1] / theirs[-1])
    return _row("overhead in one process", steps, median(ours), median(theirs), median(ratios))


def all_cores(base: Path, store: Path, steps: int, repeats: int) -> dict[str, Any]:
    """Compare worker processes with as many bare loops side by side, in turns."""
    cores = os.cpu_count() or 1
    ratios, ours, theirs = [], [], []
    with workplace(cores) as place, _bare_processes(cores, base, store, steps) as bare:
        mycel(place, base, store, 1, cores, "warm")
        for repeat in range(repeats):
            ours.append(mycel(place, base, store, steps, cores, f"run-{repeat}"))
            theirs.append(bare())
            ratios.append(ours[-1] / theirs[-1])
    return _row(f"all {cores} cores", steps, median(ours), median(theirs), median(ratios))


class _bare_processes:
    """Bare loops in processes of their own, started once; calling it runs them together and returns the seconds."""

    def __init__(self, cores: int, base: Path, store: Path, steps: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        for core in range(cores):
            ours, theirs = context.Pipe()
            share = range(core, PARTIES, cores)
            context.Process(target=_bare_worker, args=(theirs, base, store, steps, share), daemon=True).start()
            self.pipes.append(ours)

    def __enter__(self) -> _bare_processes:
        for pipe in self.pipes:
            pipe.recv_bytes()
        return self

    def __call__(self) -> float:
        with stopwatch() as seconds:
            for pipe in self.pipes:
                pipe.send_bytes(b"run")
            for pipe in self.pipes:
                pipe.recv_bytes()
        return seconds[0]

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes:
            pipe.close()


def _bare_worker(pipe: Any, base: Path, store: Path, steps: int, share: range) -> None:
    torch.set_num_threads(1)
    loop = BareLoop(base, store, steps)
    loop.run(share[:1], 1)
    pipe.send_bytes(b"ready")
    while True:
        try:
            pipe.recv_bytes()
        except EOFError:
            return
        loop.run(share)
        pipe.send_bytes(b"done")


def _row(what: str, steps: int, ours: float, theirs: float, ratio: float) -> dict[str, Any]:
    return {"what": what, "local_steps": steps, "mycel_s": ours, "bare_s": theirs, "overhead_ratio": ratio}


def main() -> None:
    """Run every comparison and print the table."""
    options = arguments(__doc__ or "", repeats={"type": int, "default": 3})
    torch.set_num_threads(1)
    base = find_base("tiny")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "tokens.safetensors", PARTIES)
        for steps in (10, 1):
            rows.append(overhead(base, store, steps, options.repeats))
            rows.append(all_cores(base, store, steps, options.repeats))
    show(f"{PARTIES} parties, {ROUNDS} rounds, batches of 8 x 128 tokens", rows, options.json)


if __name__ == "__main__":
    main()
