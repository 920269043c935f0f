"""What each arm of a run reached and spent, moment by moment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mycel.evaluate.metrics import Scores
from mycel.recipe.schema import Recipe
from mycel.rounds.simulation import Finished
from mycel.run.islands import ISLAND_ARMS


def arm_entries(
    recipe: Recipe, finished: Mapping[str, Finished], losses: Mapping[str, float | None]
) -> dict[str, dict[str, Any]]:
    """Return the entries of the arms; where ways to pre-train are compared, the system's own goes by its name.

    ``bytes`` counts the training's frames both ways, without the delivery of the result.
    """
    islands = any(name in ISLAND_ARMS for name in recipe.compare)
    entries = {}
    for name, arm in finished.items():
        entry: dict[str, Any] = {
            "system": arm.world.recipe.system,
            "state_sha256": arm.state.sha256(),
            "loss": losses[name],
            "bytes": sum(arm.meter.total(way, purpose="work") for way in ("up", "down")),
            "virtual_seconds": arm.virtual_seconds,
        }
        if islands:
            entry["curve"] = curve(arm, recipe.rounds.count * recipe.rounds.local_steps, losses[name])
        entries[recipe.system if islands and name == "system" else name] = entry
    return entries


def curve(arm: Finished, steps: int, final: float | None) -> list[dict[str, Any]]:
    """Lay out an arm's evaluated versions by what had been spent until then; ``steps`` are an island's in all.

    A version's loss is the mean over the islands, each by its latest score: where islands come one by one, not all of
    them score every version.
    """
    rounds, latest = arm.progress.rounds, dict[int, Scores]()
    points = []
    for version in sorted(arm.progress.scores):
        latest.update(arm.scores(version))
        if version >= len(rounds) or len(latest) < len(arm.world.nodes):
            continue
        spent = rounds[version - 1] if version else {"total_up": 0, "total_down": 0, "virtual_seconds": 0.0}
        loss = sum(latest.values(), Scores()).loss
        points.append(_point(steps * version / len(rounds), spent, loss if math.isfinite(loss) else None))
    return [*points, _point(float(steps), rounds[-1], final)] if rounds else points


def _point(steps: float, spent: Mapping[str, Any], loss: float | None) -> dict[str, Any]:
    sent = spent["total_up"] + spent["total_down"]
    return {"steps": steps, "bytes": sent, "virtual_seconds": spent["virtual_seconds"], "loss": loss}
