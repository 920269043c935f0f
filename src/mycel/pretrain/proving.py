"""What claims about pre-training are measured on: four islands, running text, the shape of the micro base."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

from mycel.fleet import load_fleet

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory, Trail
    from mycel.rounds.simulation import Finished

PROVING: dict[str, Any] = {
    "model.base": "micro",
    "trainable.kind": "full",
    "data.source": "python-text",
    "data.parties": "iid",
    "data.count": 4,
    "data.examples": 1000,
    "data.held_out": 16,
    "data.max_length": 64,
    "data.pack": True,
    "training.batch_size": 4,
    "training.learning_rate": 1e-3,
    "training.weight_decay": 0.1,
    "rounds.local_steps": 1,
    "rounds.evaluate_every": 1024,
    "fleet.devices": "islands",
}


def pretraining(changes: dict[str, Any]) -> dict[str, Any]:
    """Return the changes that make a laboratory's standard recipe one of pre-training."""
    return {**PROVING, **changes, "knobs": {"fresh": False, **changes.get("knobs", {})}}


def training_bytes(finished: Finished) -> int:
    """Serialised bytes of the training itself, both ways; the delivery of the result is left out."""
    return sum(finished.meter.total(way, purpose="work") for way in ("up", "down"))


def asynchronous(rounds: int, steps: int, islands: int = 4) -> dict[str, Any]:
    """Return the changes under which every arrival is a version, for as many batches as synchronous rounds take."""
    fleet = load_fleet(str(PROVING["fleet.devices"]))
    speeds = [fleet[node].gflops for node in range(islands)]
    shares = [max(1, int(steps * speed / max(speeds))) for speed in speeds]
    return {
        "rounds.count": ceil(rounds * steps * islands / (sum(shares) / islands)),
        "rounds.local_steps": steps,
        "rounds.pace": "buffered(1)",
        "rounds.staleness": 0.0,
        "knobs": {"horizon": rounds * steps},
    }


def reached(lab: Laboratory, finished: Finished, trail: Trail, target: float) -> float | None:
    """Virtual seconds after which a watched run's loss was at the target or below; None if it never was."""
    low, high = 0, len(trail.states) - 1
    if lab.mixture(finished, trail.states[high]) > target:
        return None
    # The loss falls but for noise, so a few evaluations find the place.
    while high - low > 1:
        middle = (low + high) // 2
        if lab.mixture(finished, trail.states[middle]) <= target:
            high = middle
        else:
            low = middle
    return trail.moments[high]
