"""Run a recipe from its beginning, or from wherever it was stopped, to its end.

``recipe -> base, tokens -> arms (each a coordinator on its own virtual clock) -> probes -> result, model, report``
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Collection
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mycel.data.cleaned import parse_cleaning
from mycel.data.parties import PartyData, load_parties
from mycel.data.partition import parse_partition
from mycel.data.tokens import TokenStore
from mycel.engines.inprocess import Labour
from mycel.engines.pool import WorkerPool
from mycel.errors import RecipeError, RunError
from mycel.fleet import load_fleet
from mycel.models.base import find_base, open_base
from mycel.models.save import save_run_model
from mycel.recipe.schema import Recipe
from mycel.report import write_report
from mycel.rounds.pace import parse_pace
from mycel.rounds.probe import Probes, probe_all
from mycel.rounds.registry import load_system
from mycel.rounds.simulation import Finished, Simulation, Workplace, workplace
from mycel.rounds.world import World
from mycel.run.arms import Arm, arms_of
from mycel.run.checkpoint import Sparing, checkpoint_clock, homes_of, read_checkpoint, restore
from mycel.run.folder import RunFolder, write_json, writing
from mycel.run.frames import FrameRecorder, audit_for_result
from mycel.run.log import EventLog
from mycel.run.plan import as_predicted, forecast
from mycel.run.result import build_result
from mycel.wire.codecs import parse_codec
from mycel.wire.shelf import Shelf

LOOK = 0.2  # seconds between looks whether the run was interrupted
FORETOLD = 100  # parties up to which a run's plan is made again for its report


class Watcher(Protocol):
    """Whoever shows a run's progress; every method may do nothing."""

    def phase(self, name: str, done: int, total: int) -> None:
        """A preparation has come to ``done`` of ``total``."""

    def arm(self, name: str, total: int) -> None:
        """An arm begins; it will take ``total`` answers."""

    def event(self, entry: dict[str, Any]) -> None:
        """An event was logged."""


class Silent:
    """Shows nothing."""

    def phase(self, name: str, done: int, total: int) -> None:
        """Ignore it."""

    def arm(self, name: str, total: int) -> None:
        """Ignore it."""

    def event(self, entry: dict[str, Any]) -> None:
        """Ignore it."""


@dataclass
class Execution:
    """One run in progress."""

    recipe: Recipe
    folder: RunFolder
    watcher: Watcher = field(default_factory=Silent)
    stopped: threading.Event = field(default_factory=threading.Event)

    def run(self) -> dict[str, Any]:
        """Carry the run to its end and return the content of ``result.json``."""
        started = time.monotonic()
        self.log = EventLog(self.folder.events, self.watcher.event)
        try:
            # Workers are forked before anything is computed: a process that has computed is no parent for them.
            with workplace(self.recipe.engine.workers) as place:
                base = self._prepare()
                finished = self._run_arms(place, base)
                probes = probe_all(finished, place.labour) if self.recipe.compare else Probes()
            result = build_result(self.recipe, finished, probes, time.monotonic() - started)
            if len(finished["system"].world.nodes) <= FORETOLD:
                result["predicted"] = as_predicted(forecast(finished["system"].world))
            if self.recipe.data.cleaning:
                result["cleaning"] = json.loads(self.folder.cleaning.read_text(encoding="utf-8"))
            self._conclude(result, finished["system"])
        finally:
            self.log.close()
        return result

    def _prepare(self) -> Path:
        parties = self._read_parties()
        base = find_base(self.recipe.model.base, self.watcher.phase)
        for name in load_system(self.recipe).bases():
            find_base(name, self.watcher.phase)
        self._write_tokens(parties, base)
        return base

    def _read_parties(self) -> list[PartyData]:
        """Read the data before a base is made or fetched, for it is refused sooner; nothing where tokens are kept."""
        if self.folder.tokens.exists():
            return []
        self.watcher.phase("reading the parties' data", 0, 1)
        parties = load_parties(self.recipe.data, self.recipe.seed)
        self.watcher.phase("reading the parties' data", 1, 1)
        return parties

    def _write_tokens(self, parties: list[PartyData], base: Path) -> None:
        if not parties:
            return
        spec = self.recipe.data
        store = TokenStore.build(parties, open_base(base).tokenizer, spec.max_length, spec.pack)
        if spec.cleaning:
            write_json(self.folder.cleaning, {party.name: party.cleaned for party in parties})
        temporary = self.folder.tokens.with_name(".tokens.safetensors")
        with writing(self.folder.tokens):
            store.save(temporary)
            temporary.replace(self.folder.tokens)

    def _run_arms(self, place: Workplace, base: Path) -> dict[str, Finished]:
        system = place.open("system", self.recipe, base, self.folder.tokens)
        self.log.record(
            "start",
            "system",
            recipe_sha256=self.recipe.sha256(),
            seed=self.recipe.seed,
            nodes=[node.name for node in system.nodes],
        )
        arms = arms_of(self.recipe, len(system.nodes))
        worlds = {
            arm.name: system
            if arm.name == "system"
            else place.open(arm.name, arm.recipe, base, self.folder.tokens, arm.pooled)
            for arm in arms
        }
        # Arms are independent; they take turns only where one process does all the work.
        side_by_side = isinstance(place.labour, WorkerPool)
        finished: dict[str, Finished] = {}
        with ThreadPoolExecutor(len(arms) if side_by_side else 1) as threads:
            running: dict[str, Future[Finished]] = {}
            try:
                for arm in arms:
                    if not arm.after:
                        running[arm.name] = threads.submit(self._run_arm, arm, worlds[arm.name], place.labour)
                _wait_for_all(running.values())
            except BaseException:
                # Leaving this block waits for every arm: end them, or a stopped run would go on to its end.
                self.stopped.set()
                threads.shutdown(wait=False, cancel_futures=True)
                place.labour.close()
                raise
            finished |= {name: future.result() for name, future in running.items()}
        for arm in arms:
            if arm.after:
                before = finished[arm.after]
                observer = before.world.observer(-1, before.progress.version)
                adopted = before.system.adopt(before.system.brief(before.state, -1), observer)
                worlds[arm.name].start = adopted.state()
                finished[arm.name] = self._run_arm(arm, worlds[arm.name], place.labour)
        return finished

    def _run_arm(self, arm: Arm, world: World, labour: Labour) -> Finished:
        path = self.folder.checkpoint(arm.name)
        saved = read_checkpoint(path)
        self.watcher.arm(arm.name, arm.recipe.rounds.count)
        simulation = Simulation(
            arm.name,
            world,
            labour,
            lambda event, **fields: self._record(arm.name, event, **fields),
            Sparing(path),
            Shelf(folder=path.parent),
            FrameRecorder(path.parent / "frames", arm.recipe.guard.record_frames) if arm.name == "system" else None,
        )
        if saved is None:
            return simulation.run()
        return simulation.run(homes_of(saved), checkpoint_clock(saved), lambda coordinator: restore(coordinator, saved))

    def _record(self, arm: str, event: str, **fields: Any) -> None:
        if self.stopped.is_set():
            raise RunError("the run was stopped: --resume goes on from the last round")
        self.log.record(event, arm, **fields)

    def _conclude(self, result: dict[str, Any], finished: Finished) -> None:
        """Write what a run leaves: the model, the result, the end of the log, the page."""
        self._save_model(finished)
        result["audit"] = audit_for_result(self.folder.path)
        write_json(self.folder.result, result)
        self.log.record("finish", "system", state_sha256=result["state_sha256"], seconds=result["seconds"])
        with writing(self.folder.path / "report.html"):
            write_report(self.folder.path)

    def _save_model(self, finished: Finished) -> None:
        observer = finished.world.observer(-1, finished.progress.version)
        trainable = finished.system.adopt(finished.system.brief(finished.state, -1), observer)
        temporary = self.folder.path / ".model"
        with writing(self.folder.model):
            shutil.rmtree(temporary, ignore_errors=True)
            save_run_model(finished.world.base, trainable, temporary)
            shutil.rmtree(self.folder.model, ignore_errors=True)
            temporary.rename(self.folder.model)


def _wait_for_all(running: Collection[Future[Finished]]) -> None:
    """Wait until every arm has finished, or raise what the first of them failed with.

    A signal may reach any thread, and only this one acts on it: so it looks up now and then.
    """
    waiting = set[Future[Finished]](running)
    while waiting:
        done, waiting = wait(waiting, LOOK, FIRST_EXCEPTION)
        for future in done:
            future.result()


def run_recipe(recipe: Recipe, out: Path, resume: bool = False, watcher: Watcher | None = None) -> dict[str, Any]:
    """Run ``recipe`` in the folder ``out`` and return the content of its ``result.json``."""
    check_recipe(recipe)
    folder = RunFolder(out)
    with folder.held(recipe, resume):
        return Execution(recipe, folder, watcher or Silent()).run()


def check_recipe(recipe: Recipe) -> None:
    """Refuse what can be refused before any work starts."""
    parse_pace(recipe.rounds.pace, recipe.rounds.quorum)
    if load_system(recipe).moves_base and "personal" in recipe.compare:
        raise RecipeError(
            f"compare lists 'personal', which goes on from the federation's trained state, and the system "
            f"{recipe.system!r} merges what it trains into the base: leave 'personal' out"
        )
    parties = _count_parties(recipe)
    for arm in arms_of(recipe, parties):
        load_system(arm.recipe)
    parse_cleaning(recipe.data.cleaning)
    parse_codec(recipe.wire.codec)
    parse_codec(recipe.wire.brief_codec)
    load_fleet(recipe.fleet.devices)
    ranks = recipe.trainable.rank
    if isinstance(ranks, list) and len(ranks) != parties:
        raise RecipeError(
            f"trainable.rank lists {len(ranks)} ranks for {parties} parties: give one for each, or a single rank"
        )


def _count_parties(recipe: Recipe) -> int:
    spread = recipe.data.parties
    if isinstance(spread, list):
        return len(spread)
    return 1 if parse_partition(spread)[0] == "pooled" else recipe.data.count
