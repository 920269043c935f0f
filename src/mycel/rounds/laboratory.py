"""Where claims are measured: small federations of the built-in corpus, run in process one after another."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from mycel.data.parties import load_parties
from mycel.data.tokens import TokenStore
from mycel.models.base import Base, find_base, open_base
from mycel.recipe.schema import Recipe
from mycel.rounds.coordinator import Coordinator
from mycel.rounds.probe import probe_all
from mycel.rounds.simulation import Finished, Simulation, Workplace, workplace
from mycel.rounds.system import State
from mycel.rounds.world import World
from mycel.wire.algebra import seed_of, subtract
from mycel.wire.parcel import Tensors

STANDARD: dict[str, Any] = {
    "trainable.rank": 8,
    "data.examples": 128,
    "data.held_out": 24,
    "data.max_length": 96,
    "rounds.count": 4,
    "rounds.local_steps": 5,
    "training.learning_rate": 3e-3,
}


@dataclass(frozen=True)
class Measured:
    """What a claim came to here.

    Attributes
    ----------
    measured : str
        One sentence with the figures.
    holds : bool
        Whether the property that the claim rests on was seen.
    figures : dict
        The numbers of the sentence, by name.
    """

    measured: str
    holds: bool
    figures: dict[str, float] = field(default_factory=dict)


Claim = Callable[["Laboratory"], Measured]


@dataclass
class Trail:
    """Watches a run: the engine's seconds and the state at the start and after each round."""

    moments: list[float] = field(default_factory=list)
    states: list[State] = field(default_factory=list)

    def __call__(self, coordinator: Coordinator) -> None:
        """Take note of a version that is new."""
        if coordinator.progress.version >= len(self.states):
            self.moments.append(coordinator.engine.now())
            self.states.append(coordinator.progress.state)

    def steps(self) -> list[Tensors]:
        """Return how the shared state moved in each round."""
        return [subtract(after.shared, before.shared) for before, after in pairwise(self.states)]


@dataclass
class Laboratory:
    """Runs recipes; parties' tokens are made once for each data section and seed."""

    place: Workplace
    folder: Path
    base: str = "tiny"
    _count: int = 0

    def recipe(self, system: str, changes: dict[str, Any] | None = None) -> Recipe:
        """Return the standard small recipe for ``system`` with dotted keys replaced."""
        start = Recipe(system=system).replace({"model.base": self.base, **STANDARD})
        return start.replace(changes or {})

    def world(self, recipe: Recipe, pooled: bool = False) -> World:
        """Open a new arm for ``recipe`` and return the coordinator's view of it."""
        base = find_base(recipe.model.base)
        self._count += 1
        return self.place.open(f"claim-{self._count}", recipe, base, self._tokens(recipe, base), pooled)

    def arm(self) -> str:
        """Name of the arm that ``world`` opened last."""
        return f"claim-{self._count}"

    def run(
        self,
        recipe: Recipe,
        start: Tensors | None = None,
        pooled: bool = False,
        watch: Callable[[Coordinator], None] = lambda coordinator: None,
    ) -> Finished:
        """Run ``recipe`` to its end, from ``start`` if given; ``pooled`` gives one party all the data.

        ``watch`` is called before the first round, after each, and after the result was delivered.
        """
        world = self.world(recipe, pooled)
        world.start = start
        return Simulation(f"claim-{self._count}", world, self.place.labour, checkpoint=watch).run()

    def mixture(self, finished: Finished, state: State | None = None) -> float:
        """Mean, over the models that a run made, of the loss on all parties' held-out examples together.

        ``state`` stands in for the final one, to score an earlier moment of the run.
        """
        if state is not None:
            finished = replace(finished, progress=replace(finished.progress, state=state))
        return probe_all({"system": finished}, self.place.labour).mixture("system")

    def open_base(self, name: str = "") -> Base:
        """Return a base of its own, which no simulation shares."""
        return open_base(find_base(name or self.base))

    def _tokens(self, recipe: Recipe, base: Path) -> Path:
        key = recipe.replace({"system": "fedavg", "knobs": {}}).data.model_dump_json() + f"{recipe.seed}{base}"
        path = self.folder / f"{seed_of(key)}.safetensors"
        if not path.exists():
            parties = load_parties(recipe.data, recipe.seed)
            TokenStore.build(parties, open_base(base).tokenizer, recipe.data.max_length, recipe.data.pack).save(path)
        return path


@contextmanager
def laboratory(workers: int = -1, base: str = "tiny") -> Iterator[Laboratory]:
    """Open a laboratory with its own worker processes and scratch folder."""
    with tempfile.TemporaryDirectory(prefix="mycel-") as folder, workplace(workers) as place:
        yield Laboratory(place, Path(folder), base)
