"""Recovery, rehearsed: real rank processes on this machine, of which some kill themselves at a chosen moment.

A drill trains a small decoder on seeded tokens. A death is (step, member, phase, time): SIGKILL when that member comes
to that phase ("forward", "backward", "exchange", "commit", "apply", "report") for so many times within the step. The
process that starts the ranks sees a death by the end of its pipe and announces the next epoch.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from mycel.collectives.keeper import Keeper
from mycel.engines.nursery import Nursery
from mycel.errors import EngineError
from mycel.pretrain.drill_rank import Drill, serve_drill
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
    outcome, torn = Outcome(), dict[int, int]()
    with tempfile.TemporaryDirectory(prefix="mycel-drill-") as folder:
        nursery = Nursery(serve_drill)

        def job(member: int, first: bool) -> dict[str, Any]:
            return {"drill": asdict(drill), "folder": folder, "deaths": drill.deaths if first else ()}

        def mourn(dead: list[int]) -> None:
            steps = [death[0] for death in drill.deaths if death[1] in dead]
            if len(steps) < len(dead):
                raise EngineError(f"ranks {dead} died and were not all to")
            outcome.killed += [(step, time.time()) for step in steps]
            torn[keeper.epoch + 1] = min(steps)

        again = drill.system == "restart"
        keeper = Keeper(nursery, drill.ranks, job, drill.recovery().replaces, again, LIMIT, mourn)
        try:
            for report in keeper.run().values():
                _note(outcome, report, torn)
        finally:
            nursery.close()
    outcome.survivors = len(keeper.stayed)
    if len(outcome.killed) != len({death[:2] for death in drill.deaths}):
        raise EngineError(f"{drill.deaths} were asked for, and {outcome.killed} came: see the phases")
    return outcome


def _note(outcome: Outcome, report: Parcel, torn: dict[int, int]) -> None:
    """Add a member's report; ``torn`` is the step under way when each epoch began."""
    found = report.header
    outcome.losses |= {int(step): loss for step, loss in found["losses"].items()}
    outcome.weights |= report.tensors
    for version, moment in found["reached"]:
        outcome.reached[version] = max(outcome.reached.get(version, 0.0), moment)
    later = [each for each in found["recoveries"] if each["epoch"]]
    outcome.seconds += [each["seconds"] for each in later if each["before"] >= 0]
    outcome.lost_steps = max([outcome.lost_steps, *(torn[int(each["epoch"])] - each["version"] for each in later)])
    outcome.copied = max(outcome.copied, sum(each["units"] for each in later))
    outcome.spared += found["spared"]
    outcome.sent += found["sent"]
