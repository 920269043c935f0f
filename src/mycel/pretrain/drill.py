"""Recovery, rehearsed: real rank processes on this machine, of which some kill themselves at a chosen moment.

A drill trains a small decoder on seeded tokens. A death is (step, member, phase, time): SIGKILL when that member comes
to that phase ("forward", "backward", "exchange", "commit", "apply") for so many times within the step. The process that
starts the ranks sees a death by the end of its pipe and announces the next epoch.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from multiprocessing.connection import wait

from mycel.collectives.membership import announce, open_store
from mycel.engines.nursery import Child, Nursery
from mycel.errors import EngineError
from mycel.pretrain.drill_rank import Death, Drill, serve_drill
from mycel.wire.parcel import Parcel, Tensors

LIMIT = 90.0  # seconds of a drill; then its processes are ended


@dataclass
class Outcome:
    """What a drill came to.

    Attributes
    ----------
    survivors : int
        Processes that were there from the beginning to the end.
    seconds : list of float
        That each recovery took at a survivor: meeting, finding, copying.
    lost_steps : int
        Steps that were committed and had to be taken again.
    copied, spared : int
        Units that were sent to others, and forward passes that a torn step did not repeat.
    reached : dict of int to float
        When each version was reached, the last time it was.
    """

    losses: dict[int, float] = field(default_factory=dict)
    weights: Tensors = field(default_factory=dict)
    survivors: int = 0
    seconds: list[float] = field(default_factory=list)
    lost_steps: int = 0
    copied: int = 0
    spared: int = 0
    sent: int = 0
    reached: dict[int, float] = field(default_factory=dict)
    killed: list[tuple[int, float]] = field(default_factory=list)

    def apart(self, other: Outcome) -> float:
        """Return the largest relative difference of losses and weights."""
        found = [abs(loss - other.losses[step]) / abs(other.losses[step]) for step, loss in self.losses.items()]
        for name, weight in self.weights.items():
            found.append(float((weight - other.weights[name]).norm() / other.weights[name].norm()))
        return max(found)

    def step_seconds(self) -> float:
        """Return the median step of a run, the first left out."""
        moments = [self.reached[version] for version in sorted(self.reached)][1:]
        return statistics.median(after - before for before, after in pairwise(moments))

    def lost(self, undisturbed: Outcome) -> float:
        """Seconds from a death until the step that it tore is done, less the step itself."""
        step, moment = self.killed[-1]
        return self.reached[step + 1] - moment - undisturbed.step_seconds() / 2


def drilled(drill: Drill) -> Outcome:
    """Rehearse; ``EngineError`` when a rank fails otherwise than by its death, or the limit is passed."""
    with tempfile.TemporaryDirectory(prefix="mycel-drill-") as folder:
        nursery = Nursery(serve_drill)
        try:
            return _Launcher(nursery, drill, folder).run()
        finally:
            nursery.close()


class _Launcher:
    def __init__(self, nursery: Nursery, drill: Drill, folder: str) -> None:
        self.nursery, self.drill, self.folder = nursery, drill, folder
        self.store = open_store()
        self.replaces = drill.recovery().replaces
        self.children: dict[int, Child] = {}
        self.outcome, self.first, self.epoch = Outcome(), set(range(drill.ranks)), 0
        self.torn: dict[int, int] = {}  # the step under way when each epoch began

    def run(self) -> Outcome:
        members = list(range(self.drill.ranks))
        for member in members:
            self._start(member, self.drill.deaths)
        announce(self.store, 0, members, members)
        until, done = time.monotonic() + LIMIT, set[int]()
        try:
            while set(self.children) - done:
                waiting = {self.children[member].connection: member for member in self.children if member not in done}
                ready = wait(list(waiting), max(0.0, until - time.monotonic()))
                if not ready:
                    raise EngineError(f"the drill took more than {LIMIT:g} s: ranks {sorted(waiting.values())} hang")
                dead = [waiting[found] for found in ready if not self._heard(waiting[found], done)]  # type: ignore[index]
                if dead:
                    self._mourn(dead, done)
        finally:
            for member in list(self.children):
                self._end(member)
        self.outcome.survivors = len(self.first & done)
        if len(self.outcome.killed) != len({death[:2] for death in self.drill.deaths}):
            raise EngineError(f"{self.drill.deaths} were asked for, and {self.outcome.killed} came: see the phases")
        return self.outcome

    def _start(self, member: int, deaths: tuple[Death, ...]) -> None:
        child = self.nursery.start()
        job = {"drill": asdict(self.drill), "port": self.store.port, "member": member, "folder": self.folder}
        child.connection.send_bytes(json.dumps({**job, "deaths": deaths, "epoch": self.epoch}).encode())
        self.children[member] = child

    def _end(self, member: int) -> None:
        child = self.children.pop(member)
        self.nursery.end(child)
        child.connection.close()

    def _heard(self, member: int, done: set[int]) -> bool:
        """Take a member's report; False when it has died."""
        try:
            frame = self.children[member].connection.recv_bytes()
        except (EOFError, OSError):
            return False
        report = Parcel.from_bytes(frame)
        found, outcome = report.header, self.outcome
        if found.get("error"):
            raise EngineError(f"rank {member} failed: {found['error']}")
        done.add(member)
        outcome.losses |= {int(step): loss for step, loss in found["losses"].items()}
        outcome.weights |= report.tensors
        for version, moment in found["reached"]:
            outcome.reached[version] = max(outcome.reached.get(version, 0.0), moment)
        later = [each for each in found["recoveries"] if each["epoch"]]
        survived = [each for each in later if each["before"] >= 0]
        outcome.seconds += [each["seconds"] for each in survived]
        back = [self.torn[int(each["epoch"])] - each["version"] for each in later]
        outcome.lost_steps = max([outcome.lost_steps, *back])
        outcome.copied = max(outcome.copied, sum(each["units"] for each in later))
        outcome.spared += found["spared"]
        outcome.sent += found["sent"]
        return True

    def _mourn(self, dead: list[int], done: set[int]) -> None:
        """Announce who goes on; start those that are replaced."""
        moment = time.time()
        steps = [death[0] for death in self.drill.deaths if death[1] in dead]
        if len(steps) < len(dead):
            raise EngineError(f"ranks {dead} died and were not all to")
        self.outcome.killed += [(step, moment) for step in steps]
        gone = list(self.children) if self.drill.system == "restart" else dead
        done.difference_update(gone)
        self.first.difference_update(gone)
        for member in gone:
            self._end(member)
        self.epoch += 1
        self.torn[self.epoch] = min(steps)
        fresh = gone if self.replaces else []
        for member in fresh:
            self._start(member, ())
        announce(self.store, self.epoch, sorted(self.children), fresh)
