"""Run one recipe in process: a coordinator, a fleet on a virtual clock, and whatever does the real work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mycel.data.tokens import TokenStore
from mycel.engines.inprocess import InProcessEngine, Labour
from mycel.engines.pool import Inline, WorkerPool
from mycel.evaluate.metrics import Scores
from mycel.fleet import load_fleet, run_virtual
from mycel.recipe.schema import Recipe
from mycel.rounds.coordinator import Coordinator
from mycel.rounds.host import Sites
from mycel.rounds.pace import parse_pace
from mycel.rounds.progress import Progress, Record, read_scores
from mycel.rounds.registry import load_system
from mycel.rounds.site import Job
from mycel.rounds.system import State, System
from mycel.rounds.world import Node, World
from mycel.wire.algebra import seed_of
from mycel.wire.meter import Meter
from mycel.wire.shelf import Frame, Shelf

Workers = Inline | WorkerPool


@dataclass(frozen=True)
class Finished:
    """A simulation that has come to its end; ``homes`` is what its parties keep, as frames; ``guard`` is a receipt."""

    arm: str
    world: World
    system: System
    progress: Progress
    meter: Meter
    virtual_seconds: float
    homes: Mapping[int, bytes] = field(default_factory=dict)
    guard: Mapping[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> State:
        """The final state."""
        return self.progress.state

    def scores(self, version: int | None = None) -> dict[int, Scores]:
        """Scores that parties reported for a version, by default the final one, on their own held-out examples."""
        found = self.progress.scores.get(self.progress.version if version is None else version, {})
        return read_scores(found)

    def loss(self, version: int | None = None) -> float:
        """Mean held-out loss over the parties' examples together, nats per target token."""
        return sum(self.scores(version).values(), Scores()).loss


@dataclass
class Simulation:
    """One arm, ready to run.

    Parameters
    ----------
    labour : Labour
        Does the real work under the name ``arm``.
    record : callable
        Writes events; by default they are forgotten.
    shelf : Shelf
        Where answers wait.
    wiretap : callable, optional
        Sees every frame that crosses.
    """

    arm: str
    world: World
    labour: Labour
    record: Record = lambda event, **fields: None
    checkpoint: Callable[[Coordinator], None] = lambda coordinator: None
    shelf: Shelf = field(default_factory=Shelf)
    wiretap: Callable[[str, int, str, Frame], None] | None = None

    def run(
        self,
        homes: Mapping[int, bytes] | None = None,
        clock: float = 0.0,
        restore: Callable[[Coordinator], None] | None = None,
    ) -> Finished:
        """Run to the end from the start, or from what ``homes``, ``clock`` and ``restore`` bring back."""
        return run_virtual(self._program(dict(homes or {}), restore), clock)

    async def _program(self, homes: dict[int, bytes], restore: Callable[[Coordinator], None] | None) -> Finished:
        recipe = self.world.recipe
        engine = InProcessEngine(
            self.world.fleet, self.labour, self.arm, seed_of(recipe.seed, "fleet"), homes, self.shelf
        )
        pace = parse_pace(recipe.rounds.pace, recipe.rounds.quorum)
        coordinator = Coordinator(
            self.world,
            load_system(recipe),
            engine,
            pace,
            self.record,
            self.checkpoint,
            shelf=self.shelf,
            wiretap=self.wiretap,
        )
        if restore is not None:
            restore(coordinator)
        try:
            await coordinator.run()
        finally:
            await engine.close()
        return Finished(
            self.arm,
            self.world,
            coordinator.system,
            coordinator.progress,
            coordinator.leases.meter,
            engine.now(),
            dict(engine.homes()),
            coordinator.guarding.receipt(),
        )


@dataclass
class Workplace:
    """What simulations share: the process's own host, and whatever does the real work."""

    host: Sites
    labour: Workers
    stores: dict[str, TokenStore] = field(default_factory=dict)

    def open(self, arm: str, recipe: Recipe, base: Path, store: Path, pooled: bool = False) -> World:
        """Make an arm known to every worker and return the coordinator's view of it."""
        job = Job(recipe, str(base), str(store), pooled)
        self.labour.open(arm, job.to_json())
        self.host.open(arm, job.to_json())
        site = self.host.site(arm)
        nodes = [pooled_node(site.store)] if pooled else describe(site.store, recipe)
        world = World(recipe, load_fleet(recipe.fleet.devices), nodes, site)
        world.prepare()
        return world


@contextmanager
def workplace(workers: int) -> Iterator[Workplace]:
    """Start worker processes (-1: one per core; 0: none, this process works) and end them afterwards."""
    count = workers if workers >= 0 else (os.cpu_count() or 1)
    host = Sites()
    labour: Workers = WorkerPool(Sites, count) if count else Inline(lambda: host)
    # One thread everywhere, as in the workers: the order of a parallel sum would show in the last bits of a result.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield Workplace(host, labour)
    finally:
        torch.set_num_threads(threads)
        labour.close()


def describe(store: TokenStore, recipe: Recipe) -> list[Node]:
    """Return what each party says of itself: counts, no examples."""
    ranks = recipe.trainable.rank if recipe.trainable.kind == "lora" else None
    nodes = []
    for index, name in enumerate(store.names):
        rank = ranks[index % len(ranks)] if isinstance(ranks, list) else ranks
        nodes.append(_node(index, name, store.train(index).lengths(), int(store.held_out(index).lengths().sum()), rank))
    return nodes


def pooled_node(store: TokenStore) -> Node:
    """Return the one node that stands for all parties together; it scores on no one's examples."""
    return _node(0, "everything", store.pooled().lengths(), 0, None)


def _node(index: int, name: str, lengths: Any, held_out: int, rank: int | None) -> Node:
    return Node(index, name, len(lengths), float(lengths.double().mean()), held_out, rank)
