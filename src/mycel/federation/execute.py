"""Run a recipe on a real federation: the same coordinator, log, checkpoints, result and report as in simulation.

``recipe -> base -> Flower's run -> parties say who they are -> rounds -> result, model, report``

Comparison arms are left out, and the result says so: they would need every party's data in one place.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mycel.data.table import TokenTable
from mycel.data.tokens import TokenStore
from mycel.engines.flower.engine import FlowerEngine
from mycel.errors import EngineError, RunError
from mycel.federation.member import Task, base_sha256
from mycel.federation.reach import Reach, reach
from mycel.federation.unanswered import run_seeing_to_first_briefs
from mycel.fleet import load_fleet
from mycel.models.base import find_base
from mycel.recipe.schema import Recipe
from mycel.rounds.coordinator import Coordinator
from mycel.rounds.pace import parse_pace
from mycel.rounds.probe import Probes
from mycel.rounds.registry import load_system
from mycel.rounds.simulation import Finished
from mycel.rounds.site import Job, Site
from mycel.rounds.world import Node, World
from mycel.run.checkpoint import checkpoint_clock, read_checkpoint, restore, save_checkpoint
from mycel.run.execute import Execution, Silent, Watcher, check_recipe
from mycel.run.folder import RunFolder, write_json
from mycel.run.frames import FrameRecorder
from mycel.run.log import EventLog
from mycel.run.result import build_result
from mycel.wire.shelf import Shelf

LEFT_OUT = (
    "Not compared with {}: that takes everyone's examples in one place, or each one's own model on everyone's, and on "
    "a federation neither leaves its party. Each can train alone at home: mycel run with system=local."
)
PARTIES = "parties.json"  # in a run's folder of work: who took part, for who is node 0 must stay node 0
LOOK = 0.5  # seconds between looks for parties that have joined
AWAY = 10.0  # seconds before a party whose app or node failed is asked anew


@dataclass
class Federated(Execution):
    """One run on a federation in progress."""

    hub: Reach = field(kw_only=True)
    left_out: list[str] = field(default_factory=list)
    coordinator: Coordinator | None = None
    declined: dict[str, str] = field(default_factory=dict)
    cleaned: dict[str, dict[str, int]] = field(default_factory=dict)
    seats: dict[str, int] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Carry the run to its end and return the content of ``result.json``."""
        started = time.monotonic()
        with self.opened():
            base = find_base(self.recipe.model.base, self.watcher.phase)
            for name in load_system(self.recipe).bases():
                find_base(name, self.watcher.phase)
            task = Task(self.recipe, self._name(), base_sha256(base))
            finished = asyncio.run(self._program(task, base))
            result = build_result(self.recipe, {"system": finished}, Probes(), time.monotonic() - started)
            if self.recipe.data.cleaning:
                result["cleaning"] = self.cleaned
            if self.left_out:
                result["left_out"] = LEFT_OUT.format(", ".join(self.left_out))
            self._conclude(result, finished)
        return result

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the log open, and compute on one thread: the order of a parallel sum would show in the last bits."""
        self.log = EventLog(self.folder.events, self.watcher.event)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            self.log.close()

    def _name(self) -> str:
        """Return the run's own name, under which parties keep what stays at home; the same after it was resumed."""
        path = self.folder.work / "name"
        if not path.exists():
            path.write_text(uuid.uuid4().hex)
        return path.read_text()

    async def _program(self, task: Task, base: Path) -> Finished:
        path = self.folder.checkpoint("system")
        saved = read_checkpoint(path)
        self.watcher.phase("starting Flower's run", 0, 1)
        line = await self.hub.line(task.to_json())
        self.watcher.phase("starting Flower's run", 1, 1)
        engine = FlowerEngine(line, start=checkpoint_clock(saved), most=self.recipe.wire.max_parcel)
        try:
            nodes = await self.gather(engine)
            self.coordinator = coordinator = self.coordinate(engine, nodes, base, path)
            if saved is not None:
                restore(coordinator, saved)
            elif self.declined:
                coordinator.progress.drops["declined"] = len(self.declined)
            self.watcher.arm("system", self.recipe.rounds.count)
            await run_seeing_to_first_briefs(coordinator, engine)
        finally:
            await engine.close()
            await asyncio.to_thread(self.hub.close)
        return Finished(
            "system",
            coordinator.world,
            coordinator.system,
            coordinator.progress,
            coordinator.leases.meter,
            engine.now(),
        )

    def coordinate(self, engine: FlowerEngine, nodes: list[Node], base: Path, path: Path) -> Coordinator:
        """Return a coordinator of ``nodes`` that keeps its checkpoint in ``path``."""
        recipe = self.recipe
        site = Site(Job(recipe, str(base), "nobody's"), stores={"nobody's": _no_examples()})
        world = World(recipe, load_fleet(recipe.fleet.devices), nodes, site)
        world.prepare()
        return Coordinator(
            world,
            load_system(recipe),
            engine,
            parse_pace(recipe.rounds.pace, recipe.rounds.quorum),
            self._note,
            lambda coordinator: save_checkpoint(coordinator, path),
            shelf=Shelf(folder=path.parent),
            wiretap=FrameRecorder(path.parent / "frames", recipe.guard.record_frames),
        )

    def _note(self, event: str, **fields: Any) -> None:
        """Log an event, and put down how the run stands now."""
        self._record("system", event, **fields)
        if self.coordinator is not None:
            self.hub.tell(self._standing(self.coordinator))

    def _standing(self, coordinator: Coordinator) -> dict[str, Any]:
        names = [node.name for node in coordinator.world.nodes]
        now, meter = coordinator.engine.now(), coordinator.leases.meter
        return {
            "folder": str(self.folder.path),
            "system": self.recipe.system,
            "round": coordinator.progress.version,
            "rounds": self.recipe.rounds.count,
            "parties": {
                name: {way: meter.total(way, node=node) for way in ("up", "down")} for node, name in enumerate(names)
            },
            "leases": {
                names[node]: {
                    "generation": lease.request.generation,
                    "for_seconds": now - lease.request.asked,
                    "deadline_in_seconds": None if lease.deadline is None else lease.deadline - now,
                }
                for node, lease in coordinator.leases.held.items()
            },
            "dropped": dict(coordinator.progress.drops),
        }

    async def gather(self, engine: FlowerEngine) -> list[Node]:
        """Wait for as many parties as the recipe counts on, and hear what each says of itself; some may decline."""
        wanted = len(self.recipe.data.parties) if isinstance(self.recipe.data.parties, list) else self.recipe.data.count
        before = read_names(self.folder.work / PARTIES)
        while True:
            there = await self._present(engine)
            self._check_still_admitted(before)
            names = before or [name for name in there if name not in self.declined][:wanted]
            chosen = [(name, there[name]) for name in names if name in there and name not in self.declined]
            self.watcher.phase("waiting for the parties", len(chosen), wanted)
            if len(chosen) == wanted:
                nodes = await self._hear(engine, chosen)
                if len(nodes) == wanted:
                    engine.addresses = [address for _, address in chosen]
                    write_json(self.folder.work / PARTIES, {"names": names})
                    return nodes
                if all(name not in self.declined for name, _ in chosen):
                    await asyncio.sleep(AWAY)
            elif self.declined and len(before or self.seats) - len(self.declined) < wanted:
                said = "; ".join(f"{name} says that {why}" for name, why in self.declined.items())
                raise EngineError(f"{wanted} parties are needed, and of {len(self.seats)} some decline: {said}")
            else:
                await asyncio.sleep(LOOK)

    def _check_still_admitted(self, before: Sequence[str]) -> None:
        """Refuse to go on with others than a run was begun with: what is one party's own would be given to another."""
        gone = [name for name in before if name not in self.seats]
        if self.hub.secure and gone:
            raise RunError(
                f"the run was begun with {', '.join(before)}, and {', '.join(gone)} is admitted no longer: "
                "admit it again, or start a run in another folder"
            )

    async def _hear(self, engine: FlowerEngine, chosen: list[tuple[str, int]]) -> list[Node]:
        """Return what parties say of themselves; whoever declines is logged, and not asked again.

        What Flower says of a party, that its app has crashed or its node is away, is no answer of the party's.
        """
        asked = [engine.question(address, {"verb": "describe", "node": i}) for i, (_, address) in enumerate(chosen)]
        nodes = []
        for index, (control, _) in enumerate(await asyncio.gather(*asked)):
            name = chosen[index][0]
            lost = control.get("error")
            node = lost or _node(index, name, control)
            if isinstance(node, str):
                reason = "lost" if lost else "declined"
                detail = f"{name}: {node}"
                self.log.record("drop", "system", round=0, node=index, reason=reason, detail=detail, bytes=0, at=0.0)
                self.declined |= {} if lost else {name: node}
            else:
                nodes.append(node)
                self.cleaned[name] = _counts(control["said"].get("cleaning", {}))
        return nodes

    async def _present(self, engine: FlowerEngine) -> dict[str, int]:
        """Return who is there, in the order of admission; where anyone may join, in the order of names."""
        there = await engine.nodes()
        if self.hub.secure:
            self.seats = await asyncio.to_thread(self.hub.seats)
            return {name: address for name, address in self.seats.items() if address in there}
        fresh = [address for address in there if address not in self.seats.values()]
        for address, (control, _) in zip(
            fresh, await asyncio.gather(*(engine.question(node, {"verb": "name"}) for node in fresh)), strict=True
        ):
            if "error" not in control:
                self.seats[str(control.get("said", {}).get("name", address))] = address
        return {name: address for name, address in sorted(self.seats.items()) if address in there}


def read_names(path: Path) -> list[str]:
    """Return with whom a run was begun, in the order of their numbers; nobody if it was not."""
    if not path.exists():
        return []
    try:
        return [str(name) for name in json.loads(path.read_text())["names"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(
            f"{str(path)!r} is damaged ({error}): it names the parties of the run that it belongs to"
        ) from error


def _node(index: int, name: str, control: Mapping[str, Any]) -> Node | str:
    """Read what a party says of itself, or why it takes no part."""
    said = control.get("said")
    if not isinstance(said, dict):
        return "it says nothing of itself"
    if "samples" not in said:
        return str(said.get("refusal", "it says nothing of itself"))[:500]
    try:
        rank = None if said["rank"] is None else int(said["rank"])
        return Node(index, name, int(said["samples"]), float(said["mean_tokens"]), int(said["held_out"]), rank)
    except (LookupError, ValueError, TypeError):
        return f"it describes itself as {json.dumps(said)[:80]}"


def _counts(said: Any) -> dict[str, int]:
    """What a party says that cleaning did: a few short names with whole numbers, and nothing else."""
    found = said.items() if isinstance(said, dict) else ()
    return {str(name)[:40]: count for name, count in list(found)[:32] if type(count) is int and 0 <= count < 1 << 53}


def _no_examples() -> TokenStore:
    empty = torch.zeros(0, dtype=torch.int32)
    return TokenStore(("nobody",), TokenTable(empty, torch.zeros(1, dtype=torch.int64), empty, 0), (0, 0, 0))


def run_federated(
    recipe: Recipe,
    address: str,
    out: Path,
    resume: bool = False,
    watcher: Watcher | None = None,
    key: Path | None = None,
) -> dict[str, Any]:
    """Run ``recipe`` on the federation whose coordinator listens at ``address``; ``key`` is an operator's bundle."""
    hub = reach(address, key, recipe.rounds.patience)
    left_out, recipe = recipe.compare, recipe.replace({"compare": []})
    check_recipe(recipe)
    folder = RunFolder(out)
    with folder.held(recipe, resume):
        return Federated(recipe, folder, watcher or Silent(), hub=hub, left_out=list(left_out)).run()
